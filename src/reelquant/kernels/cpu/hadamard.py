"""Hadamard transforms of rows in the first-level cache: what mixes neighbours is done in registers, what mixes distant numbers in loops.

The former is written in the compiler's own language: numba makes scalar code of sums over neighbours. Its vectors are plain ones, which
LLVM knows on every processor.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from reelquant.kernels.cpu.options import EXACT, compiled

LANES = 8  # float32 numbers in a register
INSIDE = 64  # numbers that are mixed without leaving registers: eight of them
F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(F32, LANES)


def _mixed(builder: Any, value: Any, width: int) -> Any:
    """``a + b, a - b`` of all numbers ``width`` apart in one register: its mirror plus itself, with signs."""
    order = ir.Constant(ir.VectorType(I32, LANES), [lane ^ width for lane in range(LANES)])
    signs = ir.Constant(VECTOR, [-1.0 if lane & width else 1.0 for lane in range(LANES)])
    return builder.fadd(builder.fmul(value, signs), builder.shuffle_vector(value, value, order), flags=("contract",))


def _in_registers(builder: Any, address: Any, count: int) -> None:
    """Transform ``count * LANES`` numbers at an address, in place."""
    places = [builder.inttoptr(builder.add(address, ir.Constant(I64, 4 * LANES * index)), VECTOR.as_pointer()) for index in range(count)]
    values = [builder.load(place, align=4) for place in places]
    width = 1
    while width < LANES:
        values = [_mixed(builder, value, width) for value in values]
        width *= 2
    apart = 1
    while apart < count:
        values = [
            builder.fsub(values[index - apart], value) if index & apart else builder.fadd(value, values[index + apart])
            for index, value in enumerate(values)
        ]
        apart *= 2
    for place, value in zip(places, values, strict=True):
        builder.store(value, place, align=4)


def _turning(count: int) -> Any:
    @intrinsic
    def turn(typing: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _in_registers(builder, arguments[0], count)
            return context.get_dummy_value()

        return types.void(types.int64), code

    return turn


_one, _two, _four, _eight = (_turning(count) for count in (1, 2, 4, 8))


@compiled(**EXACT)
def rotate(buffer: Any, block: int) -> None:
    """Hadamard transform of every block of the buffer, in place, without its factor ``1 / sqrt(block)``.

    Args:
        buffer: float32, contiguous, a multiple of ``block`` long.
        block: a power of two.
    """
    if block < LANES:
        width = 1
        while width < block:
            _butterflies(buffer.reshape((-1, 2, width)))
            width *= 2
        return
    width = min(block, INSIDE)
    for start in range(0, buffer.shape[0], width):
        address = buffer.ctypes.data + 4 * start
        if width == INSIDE:
            _eight(address)
        elif width == INSIDE // 2:
            _four(address)
        elif width == INSIDE // 4:
            _two(address)
        else:
            _one(address)
    while width < block:
        _butterflies(buffer.reshape((-1, 2, width)))
        width *= 2


@compiled(**EXACT)
def _butterflies(x: Any) -> None:
    """Over axes of a reshaped array: with sums as indices numba would look for negative ones, and nothing would be vectorised."""
    for i in range(x.shape[0]):
        for j in range(x.shape[2]):
            a, b = x[i, 0, j], x[i, 1, j]
            x[i, 0, j], x[i, 1, j] = a + b, a - b
