"""The tile of :mod:`~reelquant.kernels.cpu.tile` with scales: sums of a few channels leave the registers as floats, each times the two
scales of its group. And 4-bit codes to the integers that a table gives for them.

Both are written in the compiler's own language: through memory, sums of groups of 16 channels took twice as long as their products.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from reelquant.kernels.cpu.tile import COLUMNS, I32, I64, LANES, ROWS, SUMS, WIDTH, at, products

FLOAT = ir.FloatType()
FLOATS = ir.VectorType(FLOAT, LANES)
PARTS = COLUMNS // LANES
BYTES, WIDE = ir.VectorType(ir.IntType(8), LANES), ir.VectorType(I32, LANES)


def _number(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def _spread(builder: Any, value: Any, kind: ir.VectorType) -> Any:
    """A vector of one number."""
    nothing, everywhere = ir.Constant(kind, ir.Undefined), ir.Constant(SUMS, [0] * LANES)
    return builder.shuffle_vector(builder.insert_element(nothing, value, ir.Constant(I32, 0)), nothing, everywhere)


def _scaled_code(builder: Any, rows: Any, offset: Any, pairs: Any, weights: Any, factors: Any, scales: Any, kept: Any) -> None:
    """Instructions of :func:`scaled_tile`."""
    registers = [(row, part) for row in range(ROWS) for part in range(PARTS)]
    starts = [builder.add(builder.load(at(builder, rows, _number(8 * row), I64)), offset) for row in range(ROWS)]
    entry, inner, done = builder.block, builder.append_basic_block("inner"), builder.append_basic_block("done")
    builder.branch(inner)

    builder.position_at_end(inner)
    pair, here = builder.phi(I64), builder.phi(I64)
    running = [builder.phi(SUMS) for _ in registers]
    new, pair_next, here_next = products(builder, registers, starts, pair, here, running)
    for phi, first, value in (
        (pair, _number(0), pair_next),
        (here, weights, here_next),
        *((phi, ir.Constant(SUMS, [0] * LANES), value) for phi, value in zip(running, new, strict=True)),
    ):
        phi.add_incoming(first, entry)
        phi.add_incoming(value, inner)
    builder.cbranch(builder.icmp_signed("<", pair_next, pairs), inner, done)

    builder.position_at_end(done)
    columns = [builder.load(at(builder, factors, _number(4 * LANES * part), FLOATS), align=4) for part in range(PARTS)]
    lines = [_spread(builder, builder.load(at(builder, scales, _number(4 * row), FLOAT)), FLOATS) for row in range(ROWS)]
    for (row, part), total in zip(registers, new, strict=True):
        place = at(builder, kept, _number(4 * (row * WIDTH + part * LANES)), FLOATS)
        scaled = builder.fmul(builder.sitofp(total, FLOATS), builder.fmul(columns[part], lines[row]))
        builder.store(builder.fadd(builder.load(place, align=4), scaled), place, align=4)


@intrinsic
def scaled_tile(typing: Any, rows: Any, offset: Any, pairs: Any, weights: Any, factors: Any, scales: Any, kept: Any) -> Any:
    """``kept[r, c] += float(input[r] . weight[c]) * factors[c] * scales[r]`` for a tile, in pairs of 16-bit numbers.

    Args:
        rows: address of :data:`ROWS` addresses, where each row of inputs begins.
        offset: bytes from there on.
        pairs: how many are multiplied, 1 at least.
        weights: address of ``[pairs, COLUMNS, 2]`` int16.
        factors: address of :data:`COLUMNS` float32.
        scales: address of :data:`ROWS` float32.
        kept: address of ``[ROWS, WIDTH]`` float32, of which the first :data:`COLUMNS` are written.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _scaled_code(builder, *arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), code


@intrinsic
def look_up(typing: Any, codes: Any, table: Any, out: Any) -> Any:
    """A line of a panel: ``out[c] = table[low half of codes[c]] | table[high half] << 16``.

    Args:
        codes: address of :data:`COLUMNS` bytes.
        table: address of 16 int32.
        out: address of :data:`COLUMNS` int32, written.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, numbers, target = arguments
        permute = cgutils.get_or_insert_function(builder.module, ir.FunctionType(WIDE, [WIDE, WIDE]), "llvm.x86.avx2.permd")
        halves = [builder.load(at(builder, numbers, _number(4 * LANES * half), WIDE), align=4) for half in range(2)]
        constant = lambda value: ir.Constant(WIDE, [value] * LANES)  # noqa: E731

        def found(index: Any) -> Any:
            below, above = (builder.call(permute, [half, index]) for half in halves)  # reads the lowest three bits of an index
            return builder.select(builder.icmp_unsigned("<", index, constant(LANES)), below, above)

        for part in range(PARTS):
            loaded = builder.load(at(builder, source, _number(LANES * part), BYTES), align=1)
            both = builder.zext(loaded, WIDE)
            low, high = found(builder.and_(both, constant(15))), found(builder.lshr(both, constant(4)))
            joined = builder.or_(builder.shl(high, constant(16)), builder.and_(low, constant(0xFFFF)))
            builder.store(joined, at(builder, target, _number(4 * LANES * part), WIDE), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), code
