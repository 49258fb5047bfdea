"""Exact integer products on processors with AMX: one instruction multiplies 16 rows of 64 bytes with 16 columns and adds in 32 bits.

It does eight times as many products a cycle as AVX512-VNNI. A tile is loaded from rows that lie equally far apart, as those of linear
layers do; the rows of a convolution are copied behind each other first.

The registers are configured when the loop begins and given back when it ends, so nothing that oneDNN left there is relied on, and
switches of threads save nothing of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from reelquant.kernels.cpu.addresses import address, copy_bytes, matrix_at
from reelquant.kernels.cpu.finish import finish
from reelquant.kernels.cpu.loops import quantize_linear, write
from reelquant.kernels.cpu.options import EXACT, compiled
from reelquant.kernels.cpu.powers import activate

ROWS, COLUMNS = 32, 32  # of a block: four tiles of sums, two of inputs, two of weights
SIDE, BYTES = 16, 64  # rows and columns of a tile of sums; bytes that one instruction multiplies of every row
LINE = 4 * COLUMNS  # bytes of a line of weights, and of sums
ROWS_AT_ONCE = 64  # rows that are copied and multiplied at a time: a share of the second-level cache
FOUR, FIVE, SIX, SEVEN = 4, 5, 6, 7  # tiles of inputs (upper, lower rows) and of weights (left, right columns); 0 to 3 are sums
CONFIG = np.zeros(64, np.uint8)
"""Palette 1; every tile has 16 rows of 64 bytes."""
CONFIG[0] = 1
CONFIG[16:32:2] = BYTES
CONFIG[48:56] = SIDE

VOID, I8, I64 = ir.VoidType(), ir.IntType(8), ir.IntType(64)
POINTER = I8.as_pointer()
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ldtilecfg": (POINTER,), "tilerelease": (), "tilezero": (I8,), "tileloadd64": (I8, POINTER, I64), "tilestored64": (I8, POINTER, I64),
    "tdpbusd": (I8, I8, I8),
}  # fmt: skip
"""Instruction -> types of its arguments; I8 is the number of a tile."""


def _emit(builder: Any, name: str, *arguments: Any) -> None:
    kinds = FUNCTIONS[name]
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(VOID, kinds), f"llvm.x86.{name}")
    builder.call(function, [ir.Constant(I8, one) if kind is I8 else one for kind, one in zip(kinds, arguments, strict=True)])


def _at(builder: Any, address: Any, offset: int) -> Any:
    return builder.inttoptr(builder.add(address, ir.Constant(I64, offset)), POINTER)


def _block_code(builder: Any, rows: Any, stride: Any, weights: Any, steps: Any, sums: Any) -> None:
    """Instructions of :func:`_block`."""
    number = lambda value: ir.Constant(I64, value)  # noqa: E731
    for tile in range(4):
        _emit(builder, "tilezero", tile)
    below = builder.add(rows, builder.mul(stride, number(SIDE)))
    entry = builder.block
    inner, done = builder.append_basic_block("inner"), builder.append_basic_block("done")
    builder.branch(inner)

    builder.position_at_end(inner)
    step, here = builder.phi(I64), builder.phi(I64)
    across = builder.mul(step, number(BYTES))
    _emit(builder, "tileloadd64", FOUR, _at(builder, builder.add(rows, across), 0), stride)
    _emit(builder, "tileloadd64", SIX, _at(builder, here, 0), number(LINE))
    _emit(builder, "tdpbusd", 0, FOUR, SIX)
    _emit(builder, "tileloadd64", SEVEN, _at(builder, here, BYTES), number(LINE))
    _emit(builder, "tdpbusd", 1, FOUR, SEVEN)
    _emit(builder, "tileloadd64", FIVE, _at(builder, builder.add(below, across), 0), stride)
    _emit(builder, "tdpbusd", 2, FIVE, SIX)
    _emit(builder, "tdpbusd", 3, FIVE, SEVEN)
    step_next, here_next = builder.add(step, number(1)), builder.add(here, number(SIDE * LINE))
    for phi, begin, following in ((step, number(0), step_next), (here, weights, here_next)):
        phi.add_incoming(begin, entry)
        phi.add_incoming(following, inner)
    builder.cbranch(builder.icmp_signed("<", step_next, steps), inner, done)

    builder.position_at_end(done)
    for tile, offset in enumerate((0, BYTES, SIDE * LINE, SIDE * LINE + BYTES)):
        _emit(builder, "tilestored64", tile, _at(builder, sums, offset), number(LINE))


@intrinsic
def _block(typing: Any, rows: Any, stride: Any, weights: Any, steps: Any, sums: Any) -> Any:
    """``sums[r, c] = input[r] . weight[c]`` for a block of :data:`ROWS` rows and :data:`COLUMNS` columns.

    Args:
        rows: address of the inputs, unsigned bytes.
        stride: bytes from one row to the next.
        weights: address of ``[steps * 16, COLUMNS, 4]`` int8.
        steps: of :data:`BYTES` bytes in a row.
        sums: address of ``[ROWS, COLUMNS]`` int32, written.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _block_code(builder, *arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), code


@intrinsic
def _configure(typing: Any, address: Any) -> Any:
    """Give tiles the shapes that lie at an address, see :data:`CONFIG`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _emit(builder, "ldtilecfg", builder.inttoptr(arguments[0], POINTER))
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def _give_back(typing: Any) -> Any:
    """Tiles hold nothing any more."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _emit(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), code


@compiled(**EXACT)
def multiply(start, stop, codes, starts, taps, panels, channels, config, scale, sums, bias, zero, factor, tokens, share, which, out):  # type: ignore[no-untyped-def]
    """``out[m, n] = (codes of row m . weights of column n - zero * sums[n]) * scale[n] * factor + bias[n]``.

    Args:
        start, stop: units of work, :data:`ROWS_AT_ONCE` rows each.
        codes: uint8, all of them in one row of memory, and :data:`BYTES` more, which are multiplied by zero.
        starts: ``[rows]`` int64, where the codes of a row begin.
        taps: ``[taps]`` int64, where each piece of a row begins, counted from its start.
        panels: ``[panels, quads, COLUMNS, 4]`` int8; a row's codes are padded to whole steps of :data:`BYTES`, and weights there are zero.
        channels: codes in a piece.
        config: :data:`CONFIG`.
        scale, bias: ``[panels * COLUMNS]`` float32.
        sums: ``[panels * COLUMNS]`` int32, of the weights.
        zero: the code that stands for zero.
        factor: the scale of the inputs, where they share one.
        tokens: ``[rows / share]`` float32, the scale of every row, or of every ``share`` rows, instead; or empty.
        which: activation, of :data:`~reelquant.kernels.cpu.powers.ACTIVATION_CODES`.
        out: ``[rows, columns]`` float32, or bfloat16 as int16; written.
    """
    rows, columns = out.shape
    width = 4 * panels.shape[1]
    copied, kept = np.zeros(ROWS_AT_ONCE * width, np.uint8), np.empty((ROWS, COLUMNS), np.int32)
    line, less = np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.int32)
    begins, ends = _runs(taps, channels)
    _configure(address(config))
    for unit in range(start, stop):
        first = unit * ROWS_AT_ONCE
        last = min(first + ROWS_AT_ONCE, rows)
        inputs, stride = address(codes) + starts[first], starts[min(first + 1, last - 1)] - starts[first]
        apart = last - first < ROWS_AT_ONCE or taps.shape[0] > 1 or starts[last - 1] - starts[first] != (ROWS_AT_ONCE - 1) * stride
        if apart:
            inputs, stride = address(copied), width
            for r in range(first, last):
                target = address(copied) + (r - first) * width
                for run in range(len(begins)):
                    copy_bytes(target, address(codes) + starts[r] + begins[run], ends[run] - begins[run])
                    target += ends[run] - begins[run]
        for p in range(panels.shape[0]):
            left, right = p * COLUMNS, min((p + 1) * COLUMNS, columns)
            for j in range(COLUMNS):
                less[j] = np.int32(zero * sums[left + j])
            for m in range(first, last, ROWS):
                here = inputs + (m - first) * stride
                _block(here, stride, address(panels) + p * width * COLUMNS, width // BYTES, address(kept))
                for r in range(m, min(m + ROWS, last)):
                    one = tokens[r // share] if tokens.shape[0] else factor
                    if which:
                        finish(kept, (r - m) * COLUMNS, less, scale, bias, left, one, line, 0, COLUMNS)
                        activate(line, which)
                        write(line[: right - left], out[r, left:right])
                    else:
                        finish(kept, (r - m) * COLUMNS, less, scale, bias, left, one, out, r * columns + left, right - left)
    _give_back()


@compiled(**EXACT)
def _runs(taps: Any, channels: int) -> Any:
    """Begin and end of the pieces of a row, those that follow each other in memory joined."""
    begins, ends = np.empty(len(taps), np.int64), np.empty(len(taps), np.int64)
    count = 0
    for tap in range(len(taps)):
        if count and ends[count - 1] == taps[tap]:
            ends[count - 1] += channels
        else:
            begins[count], ends[count] = taps[tap], taps[tap] + channels
            count += 1
    return begins[:count], ends[:count]


@compiled(**EXACT)
def linear(
    x, kind, out, written, rows, columns, known, block, joined, multiplied, added, inverse, base, low, high, levels, codes, tokens,
    starts, taps, panels, channels, config, scale, sums, bias, zero, factor, which,
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
    multiply(0, units, codes, starts, taps, panels, channels, config, scale, sums, bias, zero, factor, tokens, 1, which, target)
    return False
