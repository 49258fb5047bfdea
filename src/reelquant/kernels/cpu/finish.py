"""From the sums of a product to its output: sixteen numbers at a time, in one pass."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from reelquant.kernels.cpu.addresses import emit_address
from reelquant.kernels.cpu.lanes import BITS, F32, I32, I64, LANES, Lanes, loop, size_of


@intrinsic
def finish(
    typing: Any, sums: Any, first: Any, less: Any, scale: Any, bias: Any, column: Any, factor: Any, out: Any, place: Any, count: Any
) -> Any:
    """``out[place + j] = (sums[first + j] - less[j]) * (scale[column + j] * factor) + bias[column + j]`` for ``count`` numbers.

    Arrays are contiguous and counted through as if they had one axis.

    Args:
        sums, less: int32.
        scale, bias: float32.
        factor: float32.
        out: float32, or bfloat16 as int16; written.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def begin(index: int, offset: Any, one: Any) -> Any:
            start = emit_address(context, builder, signature.args[index], arguments[index])
            return start if offset is None else builder.add(start, builder.mul(offset, ir.Constant(I64, size_of(one))))

        target = BITS[signature.args[7].dtype]
        first, column, factor, place, count = (arguments[index] for index in (1, 5, 6, 8, 9))
        given, less = begin(0, first, I32), begin(2, None, I32)
        scale, bias, written = begin(3, column, F32), begin(4, column, F32), begin(7, place, target)
        whole = builder.and_(count, ir.Constant(I64, -LANES))
        for lanes, start, end in ((Lanes(builder, LANES), ir.Constant(I64, 0), whole), (Lanes(builder, 1), whole, count)):
            one = lanes.spread(factor)

            def body(index: Any, lanes: Lanes = lanes, one: Any = one) -> list[Any]:
                total = builder.sub(lanes.bits(given, index, I32), lanes.bits(less, index, I32))
                slope = builder.fmul(lanes.load(scale, index, F32), one)
                value = lanes.times_plus(builder.sitofp(total, lanes.kind(F32)), slope, lanes.load(bias, index, F32))
                lanes.store_floats(value, written, index, target)
                return []

            loop(builder, start, end, lanes.count, [], body)
        return context.get_dummy_value()

    return types.void(sums, types.int64, less, scale, bias, types.int64, types.float32, out, types.int64, types.int64), code
