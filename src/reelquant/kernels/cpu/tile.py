"""Exact integer products on processors without VNNI: pairs of 16-bit numbers, multiplied and added in 32 bits by one instruction of AVX2.

The 8-bit instruction of these processors (``vpmaddubsw``) adds two products in 16 bits and saturates: with full-range codes the result is
off by a tenth. ``vpmaddwd`` takes 16-bit numbers and adds in 32 bits: exact, at nine tenths of the speed of the 8-bit one with the two
instructions that have to follow it, and 1.6 times that of float32 (registers of a Zen 3). So codes are widened, inputs when they are
rounded, weights a cache-sized piece at a time.

The innermost loop is written in the compiler's own language, because twelve sums have to stay in registers; all else is numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

from reelquant.kernels.cpu.loops import read, write
from reelquant.kernels.cpu.options import EXACT, PART, compiled
from reelquant.kernels.cpu.powers import activate

ROWS, COLUMNS = 6, 16  # of a tile: twelve registers of sums, two of weights, one of inputs, one of products
LANES = 8  # 32-bit numbers in a register
PAIRS = 768  # pairs of a tile's rows at a time: with ROWS_AT_ONCE rows of inputs, a share of the second-level cache
PANELS = 16  # panels of COLUMNS columns whose sums are kept while the inputs pass
ROWS_AT_ONCE = 96
WIDTH = PANELS * COLUMNS  # columns whose sums are kept

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
SUMS, CODES = ir.VectorType(I32, LANES), ir.VectorType(I16, 2 * LANES)


def at(builder: Any, address: Any, offset: Any, kind: Any) -> Any:
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def _tile_code(builder: Any, rows: Any, taps: Any, count: Any, pairs: Any, weights: Any, sums: Any, begin: Any) -> None:
    """Instructions of :func:`_tile`; three nested blocks, whose sums are handed from one to the next in registers."""
    number = lambda value: ir.Constant(I64, value)  # noqa: E731
    registers = [(row, part) for row in range(ROWS) for part in range(COLUMNS // LANES)]
    places = [at(builder, sums, number(4 * (row * WIDTH + part * LANES)), SUMS) for row, part in registers]
    bases = [builder.load(at(builder, rows, number(8 * row), I64)) for row in range(ROWS)]
    entry = builder.block
    going, outer, inner, after, done = (builder.append_basic_block(name) for name in ("going", "outer", "inner", "after", "done"))
    builder.cbranch(builder.icmp_signed("!=", begin, number(0)), outer, going)

    builder.position_at_end(going)
    kept = [builder.load(place, align=4) for place in places]
    builder.branch(outer)

    builder.position_at_end(outer)
    tap, weight = builder.phi(I64), builder.phi(I64)
    totals = [builder.phi(SUMS) for _ in registers]
    for total, value in zip(totals, kept, strict=True):
        total.add_incoming(ir.Constant(SUMS, [0] * LANES), entry)
        total.add_incoming(value, going)
    for block in (entry, going):
        tap.add_incoming(number(0), block)
        weight.add_incoming(weights, block)
    offset = builder.load(at(builder, taps, builder.mul(tap, number(8)), I64))
    starts = [builder.add(base, offset) for base in bases]
    builder.branch(inner)

    builder.position_at_end(inner)
    pair, here = builder.phi(I64), builder.phi(I64)
    running = [builder.phi(SUMS) for _ in registers]
    new, pair_next, here_next = products(builder, registers, starts, pair, here, running)
    pair.add_incoming(number(0), outer)
    here.add_incoming(weight, outer)
    pair.add_incoming(pair_next, inner)
    here.add_incoming(here_next, inner)
    for phi, total, value in zip(running, totals, new, strict=True):
        phi.add_incoming(total, outer)
        phi.add_incoming(value, inner)
    builder.cbranch(builder.icmp_signed("<", pair_next, pairs), inner, after)

    builder.position_at_end(after)
    tap_next = builder.add(tap, number(1))
    tap.add_incoming(tap_next, after)
    weight.add_incoming(here_next, after)
    for total, value in zip(totals, new, strict=True):
        total.add_incoming(value, after)
    builder.cbranch(builder.icmp_signed("<", tap_next, count), outer, done)

    builder.position_at_end(done)
    for place, value in zip(places, new, strict=True):
        builder.store(value, place, align=4)


def products(builder: Any, registers: Any, starts: Any, pair: Any, here: Any, running: Any) -> tuple[Any, Any, Any]:
    """One pair of every row times one pair of every column, added to the running sums."""
    number = lambda value: ir.Constant(I64, value)  # noqa: E731
    multiply = cgutils.get_or_insert_function(builder.module, ir.FunctionType(SUMS, [CODES, CODES]), "llvm.x86.avx2.pmadd.wd")
    weights = [builder.load(at(builder, here, number(4 * LANES * part), CODES), align=2) for part in range(COLUMNS // LANES)]
    nothing, everywhere = ir.Constant(SUMS, ir.Undefined), ir.Constant(SUMS, [0] * LANES)
    step = builder.mul(pair, number(4))
    inputs = []
    for start in starts:
        both = builder.load(at(builder, start, step, I32), align=2)
        spread = builder.shuffle_vector(builder.insert_element(nothing, both, ir.Constant(I32, 0)), nothing, everywhere)
        inputs.append(builder.bitcast(spread, CODES))
    new = [
        builder.add(total, builder.call(multiply, [inputs[row], weights[part]]))
        for (row, part), total in zip(registers, running, strict=True)
    ]
    return new, builder.add(pair, number(1)), builder.add(here, number(4 * COLUMNS))


@intrinsic
def _tile(typing: Any, rows: Any, taps: Any, count: Any, pairs: Any, weights: Any, sums: Any, begin: Any) -> Any:
    """``sums[r, c] += input[r] . weight[c]`` for a tile, in pairs of 16-bit numbers.

    Args:
        rows: address of :data:`ROWS` addresses, where each row of inputs begins.
        taps: address of ``count`` offsets in bytes: a row is made of pieces that lie apart (the window of a convolution).
        pairs: in a piece.
        weights: address of ``[count, pairs, COLUMNS, 2]`` int16.
        sums: address of ``[ROWS, WIDTH]`` int32, of which the first :data:`COLUMNS` are written.
        begin: 1 to begin at zero instead of at what ``sums`` holds.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _tile_code(builder, *arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), code


# --- weights: as they are kept, and 16 bits wide --------------------------------------------------------------------------------------


def factors(panels: Any, p: Any, scales: Any, step: Any, first: Any, last: Any, out: Any) -> None:
    """What 4-bit codes of a panel are multiplied with before they are rounded: computed for every piece, so nothing is stored.

    Args:
        panels: see :func:`multiply`; 8-bit ones have no groups, and nothing is written.
        p: which panel.
        scales: ``[rows, groups]`` float32, or bfloat16 as int16, as they are stored.
        step: ``[panels * COLUMNS]`` float32, the scale of the row's integers.
        first, last: groups.
        out: ``[groups, COLUMNS]`` float32, written from its begin.
    """


@overload(factors, jit_options=PART)
def _factors_of(panels: Any, p: Any, scales: Any, step: Any, first: Any, last: Any, out: Any) -> Any:
    if panels.ndim == 5:

        def nothing(panels: Any, p: Any, scales: Any, step: Any, first: Any, last: Any, out: Any) -> None:
            pass

        return nothing

    def quotients(panels: Any, p: Any, scales: Any, step: Any, first: Any, last: Any, out: Any) -> None:
        some = np.empty(last - first, np.float32)
        out[: last - first] = np.float32(0)  # rows that fill the last panel
        for row in range(p * COLUMNS, min((p + 1) * COLUMNS, scales.shape[0])):
            read(scales[row, first:last], some)
            for g in range(last - first):
                out[g, row - p * COLUMNS] = some[g] / step[row]

    return quotients


def widen(panel: Any, fold: Any, group: Any, first: Any, out: Any) -> None:
    """A piece of a panel as 16-bit numbers ``[pairs, COLUMNS]``, a pair in 32 bits.

    Args:
        panel: ``[pairs, COLUMNS, 2]`` int8, or ``[pairs, COLUMNS]`` uint8 that hold two 4-bit codes each, 8 standing for zero.
        fold: ``[groups, COLUMNS]`` float32, the :func:`factors` of 4-bit codes.
        group: pairs in a group.
        first: which pair of its group the first one is.
        out: ``[pairs, COLUMNS]`` int32, written.
    """


@overload(widen, jit_options=PART)
def _widen_of(panel: Any, fold: Any, group: Any, first: Any, out: Any) -> Any:
    if panel.ndim == 3:

        def bytes_(panel: Any, fold: Any, group: Any, first: Any, out: Any) -> None:
            flat, target = panel.reshape(-1), out.view(np.int16).reshape(-1)
            for j in range(flat.shape[0]):
                target[j] = flat[j]

        return bytes_

    def nibbles(panel: Any, fold: Any, group: Any, first: Any, out: Any) -> None:
        for k in range(panel.shape[0]):
            factor, codes, line = fold[(first + k) // group], panel[k], out[k]
            for j in range(COLUMNS):
                byte = np.int32(codes[j])
                low = np.int32(np.rint(np.float32(np.int32((byte & np.int32(15)) - np.int32(8))) * factor[j]))
                high = np.int32(np.rint(np.float32(np.int32((byte >> np.int32(4)) - np.int32(8))) * factor[j]))
                line[j] = np.int32(np.int32(high << np.int32(16)) | np.int32(low & np.int32(0xFFFF)))

    return nibbles


@compiled(**EXACT)
def add_up(start, stop, panels, scales, step, group, out):  # type: ignore[no-untyped-def]
    """Sums of the widened weights of every column: ``[panels, COLUMNS]`` int32."""
    wide, fold = np.empty((panels.shape[2], COLUMNS), np.int32), np.empty((scales.shape[1], COLUMNS), np.float32)
    for p in range(start, stop):
        factors(panels, p, scales, step, 0, scales.shape[1], fold)
        for j in range(COLUMNS):
            out[p, j] = 0
        for t in range(panels.shape[1]):
            widen(panels[p, t], fold, group, 0, wide)
            both = wide.view(np.int16)
            for k in range(both.shape[0]):
                for j in range(COLUMNS):
                    out[p, j] += both[k, 2 * j] + both[k, 2 * j + 1]


# --- products -------------------------------------------------------------------------------------------------------------------------


@compiled(**EXACT)
def multiply(start, stop, codes, starts, taps, panels, scales, group, scale, sums, bias, zero, factor, tokens, share, which, out):  # type: ignore[no-untyped-def]
    """``out[m, n] = (codes of row m . weights of column n - zero * sums[n]) * scale[n] * factor + bias[n]``.

    Args:
        start, stop: units of work, each :data:`ROWS_AT_ONCE` rows and :data:`PANELS` panels.
        codes: int16, all of them in one row of memory.
        starts: ``[rows]`` int64, where the codes of a row begin.
        taps: ``[taps]`` int64, where each piece of a row begins, counted from its start.
        panels: ``[panels, taps, pairs, COLUMNS, 2]`` int8 or ``[panels, taps, pairs, COLUMNS]`` uint8; see :func:`widen`.
        scales, group: see :func:`factors` and :func:`widen`.
        scale, bias: ``[panels * COLUMNS]`` float32.
        sums: ``[panels * COLUMNS]`` int32, of the widened weights; read where ``zero``, the code that stands for zero, is not 0.
        factor: the scale of the inputs, where they share one.
        tokens: ``[rows / share]`` float32, the scale of every row, or of every ``share`` rows, instead; or empty.
        which: activation, of :data:`~reelquant.kernels.cpu.powers.ACTIVATION_CODES`.
        out: ``[rows, columns]`` float32, or bfloat16 as int16; written.
    """
    chunks = -(-panels.shape[0] // PANELS)
    kept = np.empty((ROWS_AT_ONCE, WIDTH), np.int32)
    pieces, longest = _pieces(panels.shape[1], panels.shape[2])
    wide, fold = np.empty((longest, COLUMNS), np.int32), np.empty((longest // group + 2, COLUMNS), np.float32)
    addresses, offsets = np.empty(ROWS_AT_ONCE, np.int64), np.empty(len(taps), np.int64)
    line = np.empty(WIDTH, np.float32)
    for unit in range(start, stop):
        first, one = unit // chunks * ROWS_AT_ONCE, unit % chunks * PANELS
        last, end = min(first + ROWS_AT_ONCE, len(starts)), min(one + PANELS, panels.shape[0])
        for r in range(ROWS_AT_ONCE):  # the last tile repeats its last row
            addresses[r] = codes.ctypes.data + 2 * starts[min(first + r, last - 1)]
        for piece in range(len(pieces)):
            tap, tap_end, pair, pair_end = pieces[piece]
            for t in range(tap, tap_end):
                offsets[t - tap] = 2 * taps[t] + 4 * pair
            length = pair_end - pair
            for p in range(one, end):
                factors(panels, p, scales, scale, pair // group, (pair_end - 1) // group + 1, fold)
                for t in range(tap, tap_end):
                    widen(panels[p, t, pair:pair_end], fold, group, pair % group, wide[(t - tap) * length : (t - tap + 1) * length])
                for m in range(0, last - first, ROWS):
                    target = kept.ctypes.data + 4 * (m * WIDTH + (p - one) * COLUMNS)
                    _tile(addresses.ctypes.data + 8 * m, offsets.ctypes.data, tap_end - tap, length, wide.ctypes.data, target, piece == 0)
        left, right = one * COLUMNS, min(end * COLUMNS, out.shape[1])
        for m in range(first, last):
            if zero:
                _less(kept[m - first], sums[left:right], np.int32(zero))
            _finish(kept[m - first], scale[left:right], tokens[m // share] if tokens.shape[0] else factor, bias[left:right], line)
            if which:
                activate(line[: right - left], which)
            write(line[: right - left], out[m, left:right])


@compiled(**EXACT)
def _pieces(taps: int, pairs: int) -> Any:
    """First and last tap and pair of the pieces that a row is multiplied in, and the pairs of the longest."""
    found = []
    if taps == 1:
        for pair in range(0, pairs, PAIRS):
            found.append((0, 1, pair, min(pair + PAIRS, pairs)))
        return found, min(pairs, PAIRS)
    some = max(PAIRS // pairs, 1)
    for tap in range(0, taps, some):
        found.append((tap, min(tap + some, taps), 0, pairs))
    return found, min(some, taps) * pairs


@compiled(**EXACT)
def _less(total: Any, sums: Any, zero: Any) -> None:
    for j in range(sums.shape[0]):
        total[j] = np.int32(total[j] - np.int32(zero * sums[j]))


@compiled(**EXACT)
def _finish(total: Any, scale: Any, factor: Any, bias: Any, line: Any) -> None:
    for j in range(scale.shape[0]):
        line[j] = np.float32(total[j]) * (scale[j] * factor) + bias[j]
