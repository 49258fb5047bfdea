"""Where arrays lie, for loops in the compiler's own language.

``array.ctypes.data`` counts a reference to the array, and so does every slice: two locked instructions, which take as long as a row of 64
numbers.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from reelquant.kernels.cpu.options import EXACT, compiled


def emit_address(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """The address of the first number of an array of this type, as 64 bits."""
    return builder.ptrtoint(make_array(kind)(context, builder, array).data, ir.IntType(64))


@intrinsic
def address(typing: Any, array: Any) -> Any:
    """The address of the first number of an array."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return emit_address(context, builder, signature.args[0], arguments[0])

    return types.int64(array), code


@intrinsic
def copy_bytes(typing: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy so many bytes from one address to another; the two do not overlap."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        to, from_ = (builder.inttoptr(one, byte) for one in arguments[:2])
        cgutils.raw_memcpy(builder, to, from_, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), code


@intrinsic
def _pointer(typing: Any, address: Any, kind: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind.dtype)(types.int64, kind), code


@compiled(**EXACT)
def matrix_at(address: int, kind: Any, rows: int, columns: int) -> Any:
    """``[rows, columns]`` of the memory at an address; its numbers are of the dtype of the array ``kind``."""
    return numba.carray(_pointer(address, kind), (rows, columns))
