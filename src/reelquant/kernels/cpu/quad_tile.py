"""Exact integer products on processors with AVX512-VNNI: four products of bytes are added in 32 bits by one instruction.

oneDNN has the same instruction. What it costs beside its products (35 microseconds a call, and convolutions of few channels over few places
at a quarter of the instruction's rate) is more than the products of small layers take; a call of this loop costs 8 microseconds.

The innermost loop is written in the compiler's own language, because 24 sums have to stay in registers; all else is numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from reelquant.kernels.cpu.addresses import address, matrix_at
from reelquant.kernels.cpu.finish import finish
from reelquant.kernels.cpu.loops import quantize_linear, write
from reelquant.kernels.cpu.options import EXACT, compiled
from reelquant.kernels.cpu.powers import activate

ROWS, COLUMNS = 12, 32  # of a tile: 24 registers of sums, two of weights, one of inputs
LANES = 16  # 32-bit numbers in a register
PARTS = COLUMNS // LANES
ROWS_AT_ONCE = 96  # rows whose inputs stay in the first-level cache while all panels of weights pass

I32, I64 = ir.IntType(32), ir.IntType(64)
SUMS = ir.VectorType(I32, LANES)
PRODUCTS = "llvm.x86.avx512.vpdpbusd.512"  # (sums, unsigned bytes, signed bytes) -> sums


def _at(builder: Any, address: Any, offset: Any, kind: Any) -> Any:
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def _tile_code(builder: Any, rows: Any, taps: Any, count: Any, quads: Any, weights: Any, sums: Any) -> None:
    """Instructions of :func:`_tile`: a loop over pieces around one over quads, whose sums stay in registers."""
    number = lambda value: ir.Constant(I64, value)  # noqa: E731
    bases = [builder.load(_at(builder, rows, number(8 * row), I64)) for row in range(ROWS)]
    zero = ir.Constant(SUMS, [0] * LANES)
    entry = builder.block
    outer, inner, after, done = (builder.append_basic_block(name) for name in ("outer", "inner", "after", "done"))
    builder.branch(outer)

    builder.position_at_end(outer)
    tap, weight = builder.phi(I64), builder.phi(I64)
    totals = [builder.phi(SUMS) for _ in range(ROWS * PARTS)]
    for phi, value in ((tap, number(0)), (weight, weights), *((total, zero) for total in totals)):
        phi.add_incoming(value, entry)
    offset = builder.load(_at(builder, taps, builder.mul(tap, number(8)), I64))
    starts = [builder.add(base, offset) for base in bases]
    builder.branch(inner)

    builder.position_at_end(inner)
    quad, here = builder.phi(I64), builder.phi(I64)
    running = [builder.phi(SUMS) for _ in totals]
    new = _products(builder, starts, quad, here, running)
    quad_next, here_next = builder.add(quad, number(1)), builder.add(here, number(4 * COLUMNS))
    for phi, begin, following in ((quad, number(0), quad_next), (here, weight, here_next), *zip(running, totals, new, strict=True)):
        phi.add_incoming(begin, outer)
        phi.add_incoming(following, inner)
    builder.cbranch(builder.icmp_signed("<", quad_next, quads), inner, after)

    builder.position_at_end(after)
    tap_next = builder.add(tap, number(1))
    for phi, following in ((tap, tap_next), (weight, here_next), *zip(totals, new, strict=True)):
        phi.add_incoming(following, after)
    builder.cbranch(builder.icmp_signed("<", tap_next, count), outer, done)

    builder.position_at_end(done)
    for index, value in enumerate(new):
        builder.store(value, _at(builder, sums, number(4 * LANES * index), SUMS), align=4)


def _products(builder: Any, starts: Any, quad: Any, here: Any, running: Any) -> list[Any]:
    """Four numbers of every row times four of every column, added to the running sums."""
    multiply = cgutils.get_or_insert_function(builder.module, ir.FunctionType(SUMS, [SUMS, SUMS, SUMS]), PRODUCTS)
    weights = [builder.load(_at(builder, here, ir.Constant(I64, 4 * LANES * part), SUMS), align=1) for part in range(PARTS)]
    nothing, everywhere = ir.Constant(SUMS, ir.Undefined), ir.Constant(SUMS, [0] * LANES)
    step, new = builder.mul(quad, ir.Constant(I64, 4)), []
    for row, start in enumerate(starts):
        four = builder.load(_at(builder, start, step, I32), align=1)
        spread = builder.shuffle_vector(builder.insert_element(nothing, four, ir.Constant(I32, 0)), nothing, everywhere)
        new += [builder.call(multiply, [running[row * PARTS + part], spread, weights[part]]) for part in range(PARTS)]
    return new


@intrinsic
def _tile(typing: Any, rows: Any, taps: Any, count: Any, quads: Any, weights: Any, sums: Any) -> Any:
    """``sums[r, c] = input[r] . weight[c]`` for a tile, in quads of 8-bit numbers.

    Args:
        rows: address of :data:`ROWS` addresses, where each row of inputs begins.
        taps: address of ``count`` offsets in bytes: a row is made of pieces that lie apart (the window of a convolution).
        quads: in a piece.
        weights: address of ``[count, quads, COLUMNS, 4]`` int8.
        sums: address of ``[ROWS, COLUMNS]`` int32, written.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _tile_code(builder, *arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), code


@compiled(**EXACT)
def multiply(start, stop, codes, starts, taps, panels, scale, sums, bias, zero, factor, tokens, share, which, out):  # type: ignore[no-untyped-def]
    """``out[m, n] = (codes of row m . weights of column n - zero * sums[n]) * scale[n] * factor + bias[n]``.

    Args:
        start, stop: units of work, :data:`ROWS_AT_ONCE` rows each.
        codes: uint8, all of them in one row of memory, and three more.
        starts: ``[rows]`` int64, where the codes of a row begin.
        taps: ``[taps]`` int64, where each piece of a row begins, counted from its start.
        panels: ``[panels, taps, quads, COLUMNS, 4]`` int8.
        scale, bias: ``[panels * COLUMNS]`` float32.
        sums: ``[panels * COLUMNS]`` int32, of the weights.
        zero: the code that stands for zero.
        factor: the scale of the inputs, where they share one.
        tokens: ``[rows / share]`` float32, the scale of every row, or of every ``share`` rows, instead; or empty.
        which: activation, of :data:`~reelquant.kernels.cpu.powers.ACTIVATION_CODES`.
        out: ``[rows, columns]`` float32, or bfloat16 as int16; written.
    """
    rows, columns = out.shape
    addresses, kept = np.empty(ROWS_AT_ONCE, np.int64), np.empty((ROWS, COLUMNS), np.int32)
    line, less = np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.int32)
    for unit in range(start, stop):
        first = unit * ROWS_AT_ONCE
        last = min(first + ROWS_AT_ONCE, rows)
        for r in range(ROWS_AT_ONCE):  # the last tile repeats its last row
            addresses[r] = address(codes) + starts[min(first + r, last - 1)]
        for p in range(panels.shape[0]):
            left, right = p * COLUMNS, min((p + 1) * COLUMNS, columns)
            for j in range(COLUMNS):
                less[j] = np.int32(zero * sums[left + j])
            for m in range(first, last, ROWS):
                here = address(panels) + p * panels.shape[1] * panels.shape[2] * 4 * COLUMNS
                _tile(address(addresses) + 8 * (m - first), address(taps), panels.shape[1], panels.shape[2], here, address(kept))
                for r in range(m, min(m + ROWS, last)):
                    one = tokens[r // share] if tokens.shape[0] else factor
                    if which:
                        finish(kept, (r - m) * COLUMNS, less, scale, bias, left, one, line, 0, COLUMNS)
                        activate(line, which)
                        write(line[: right - left], out[r, left:right])
                    else:
                        finish(kept, (r - m) * COLUMNS, less, scale, bias, left, one, out, r * columns + left, right - left)


@compiled(**EXACT)
def linear(
    x, kind, out, written, rows, columns, known, block, joined, multiplied, added, inverse, base, low, high, levels, codes, tokens,
    starts, taps, panels, scale, sums, bias, zero, factor, which,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Inputs to codes, and their product, in one call: to begin a loop costs as much as a small product.

    Args:
        x, out: addresses of ``[rows, channels]`` and ``[rows, columns]``; of what is told by the arrays ``kind`` and ``written``.
        known: whether the codes are there already.
        block, ..., tokens: of :func:`~reelquant.kernels.cpu.loops.quantize_linear`.

    Returns:
        Whether the input may hold NaN or infinities; nothing is multiplied then.
    """
    if not known:
        given = matrix_at(x, kind, rows, codes.shape[0] // rows)
        if quantize_linear(given, block, joined, multiplied, added, inverse, base, low, high, levels, codes, tokens):
            return True
    target, units = matrix_at(out, written, rows, columns), -(-rows // ROWS_AT_ONCE)
    multiply(0, units, codes, starts, taps, panels, scale, sums, bias, zero, factor, tokens, 1, which, target)
    return False
