"""Attention in fixed point, for processors that multiply no bfloat16: both products in pairs of 16-bit numbers, with sums of 32 bits.

    scores  = codes(q) . codes(k) * scale_q * scale_k            12 bits, a scale per token on both sides
    p       = codes(2^(scores - largest of 256 keys))            13 bits
    output += p . codes(v) * scale_v                             11 bits, a scale per channel; sums are floats from 256 keys to the next

What :mod:`reelquant.kernels.cpu.tile` multiplies may have up to 16 bits, so nothing is rounded to 8: the error is below that of attention
written out in bfloat16, and the products are those of integers. Weights are scaled by the largest score of every 256 keys, as scores pass
by, so a long tail of small ones is not lost; they are summed as rounded, so they add up to one.

Source: the running maximum and sum are those of FlashAttention (arXiv 2205.14135). Fixed point instead of floats is ours.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reelquant.kernels.cpu import loops
from reelquant.kernels.cpu.int16_madd import available
from reelquant.kernels.cpu.options import EXACT, compiled
from reelquant.kernels.cpu.powers import times_power
from reelquant.kernels.cpu.softmax import LOWEST as SMALLEST
from reelquant.kernels.cpu.softmax import POWER
from reelquant.kernels.cpu.tile import COLUMNS, ROWS, ROWS_AT_ONCE, WIDTH, _tile

KEYS = WIDTH  # keys at a time: their scores are the sums that a row of tiles keeps
TOKEN = np.float32(2047)  # largest code of queries and keys: 256 channels of them add up to less than 2^31
SHARE, VALUE = np.float32(8191), np.float32(1023)  # the same for weights and values, over KEYS keys
HEADS = (40, 256)  # widths of heads
MANY = 512  # keys from which fixed point wins
ROUNDS = 256  # queries from which it does
LOWEST = np.float32(-3e38)  # a score before there are any
STOCK = torch._C._nn.scaled_dot_product_attention  # F.scaled_dot_product_attention may be one that ends up here
CODES_AT_ONCE = 1 << 25  # numbers of keys and values that are made codes before queries meet them

_finite: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": {"contract", "nsz", "nnan", "ninf", "arcp", "reassoc"}}


def refuses(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why stock attention should compute this, or None."""
    if not query.dtype == key.dtype == value.dtype or query.dtype not in (torch.float32, torch.bfloat16):
        return f"{query.dtype} with {key.dtype}, {value.dtype}; all float32 or all bfloat16 would do"
    if query.ndim != 4 or query.shape[:2] != key.shape[:2] or key.shape[:3] != value.shape[:3] or query.shape[3] != key.shape[3]:
        return "not [batch, heads, tokens, head], or heads share keys"
    widths = (query.shape[3], value.shape[3])
    if not all(HEADS[0] <= width <= HEADS[1] for width in widths) or query.shape[3] % 2:
        return f"heads of {widths[0]} channels"
    if key.shape[2] < MANY or query.shape[2] < ROUNDS:
        return "too short to gain"
    if (capability := torch.backends.cpu.get_cpu_capability()) != "AVX2":  # wider registers multiply floats faster than these loops codes
        return f"fixed point gains where torch has AVX2 and no more (it says {capability})"
    return available()


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """``softmax(query key^T * scale) value`` per head; by torch if inputs hold NaN or infinities, which no code stands for.

    Args:
        query: ``[batch, heads, queries, head]`` float32 or bfloat16.
        key, value: ``[batch, heads, keys, head]``.
        scale: unitless; ``head ** -0.5`` by default.

    Returns:
        ``[batch, heads, queries, head]`` in the memory order of ``[batch, queries, heads, head]``, which callers flatten next.
    """
    batch, heads, queries, width = query.shape
    factor = np.float32((width**-0.5 if scale is None else scale) * math.log2(math.e))
    out = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
    size = key.shape[2] * max(width, value.shape[3])
    clips, some = max(CODES_AT_ONCE // (heads * size), 1), min(max(CODES_AT_ONCE // size, 1), heads)
    for part in itertools.product(range(0, batch, clips), range(0, heads, some)):
        here = tuple(slice(start, start + step) for start, step in zip(part, (clips, some), strict=True))
        if not _attend(*(loops.view(x[here]) for x in (query, key, value, out)), factor):
            return STOCK(query, key, value, scale=scale)
    return out


def _attend(q: Any, k: Any, v: Any, out: Any, factor: np.float32) -> bool:
    heads, keys, width = k.shape[0] * k.shape[1], *k.shape[2:]
    panels = np.zeros((heads, -(-keys // COLUMNS), width // 2, COLUMNS), np.int32)
    scales = np.empty((heads, panels.shape[1] * COLUMNS), np.float32)
    blocks, columns = -(-keys // KEYS), -(-v.shape[3] // COLUMNS)
    values = np.zeros((heads, blocks, columns, KEYS // 2, COLUMNS), np.int32)
    tops = np.zeros((heads, columns * COLUMNS), np.float32)
    strange = loops.spread(key_codes, heads * panels.shape[1], k.size, k, panels, scales)
    strange |= loops.spread(value_tops, heads, v.size, v, tops)
    if strange:
        return False
    loops.spread(value_codes, heads * blocks, v.size, v, tops, values)
    units = heads * -(-q.shape[2] // ROWS_AT_ONCE)
    return not loops.spread(attend, units, q.size * keys, q, panels, scales, values, tops, keys, factor, out)


# --- keys and values in panels --------------------------------------------------------------------------------------------------------


@compiled(**_finite)
def _largest(row: Any) -> Any:
    top = np.float32(0)
    for j in range(row.shape[0]):
        top = max(top, abs(row[j]))
    return top


@compiled(**EXACT)
def _token_codes(buffer: Any, codes: Any) -> Any:
    """Codes of a token, its scale, and whether it may hold NaN or infinities."""
    scale = max(_largest(buffer) / TOKEN, np.finfo(np.float32).tiny)
    inverse = np.float32(1) / scale
    for j in range(buffer.shape[0]):
        codes[j] = np.int32(np.rint(buffer[j] * inverse))
    return scale, loops._strange(buffer)


@compiled(**EXACT)
def key_codes(start, stop, k, panels, scales):  # type: ignore[no-untyped-def]
    """Keys as panels of columns: ``[heads, panels, pairs, COLUMNS]``, two codes in 32 bits; ``scales`` ``[heads, keys]``."""
    buffer, codes = np.empty(k.shape[3], np.float32), np.empty(k.shape[3], np.int16)
    pairs, strange = codes.view(np.int32), False
    for unit in range(start, stop):
        head, p = unit // panels.shape[1], unit % panels.shape[1]
        tokens, panel = k[head // k.shape[1], head % k.shape[1]], panels[head, p]
        for j in range(COLUMNS):
            t = p * COLUMNS + j
            if t < tokens.shape[0]:
                loops.read(tokens[t], buffer)
                scales[head, t], broken = _token_codes(buffer, codes)
                strange |= broken
                for i in range(pairs.shape[0]):
                    panel[i, j] = pairs[i]
    return strange


@compiled(**EXACT)
def value_tops(start, stop, v, tops):  # type: ignore[no-untyped-def]
    """The scale of every channel: ``[heads, channels]``."""
    buffer, strange = np.empty(v.shape[3], np.float32), False
    for head in range(start, stop):
        top, tokens = tops[head], v[head // v.shape[1], head % v.shape[1]]
        for t in range(tokens.shape[0]):
            loops.read(tokens[t], buffer)
            strange |= loops._strange(buffer)
            for c in range(buffer.shape[0]):
                top[c] = max(top[c], abs(buffer[c]))
        for c in range(top.shape[0]):
            top[c] = max(top[c] / VALUE, np.finfo(np.float32).tiny)
    return strange


@compiled(**EXACT)
def value_codes(start, stop, v, tops, values):  # type: ignore[no-untyped-def]
    """Values as panels of columns, a block of keys at a time: ``[heads, blocks, panels, KEYS / 2, COLUMNS]``, two keys in 32 bits."""
    width = v.shape[3]
    buffer, inverse = np.empty(width, np.float32), np.empty(width, np.float32)
    for unit in range(start, stop):
        head, block = unit // values.shape[1], unit % values.shape[1]
        for c in range(width):
            inverse[c] = np.float32(1) / tops[head, c]
        target, tokens = values[head, block].view(np.int16), v[head // v.shape[1], head % v.shape[1]]
        for t in range(block * KEYS, min((block + 1) * KEYS, tokens.shape[0])):
            loops.read(tokens[t], buffer)
            pair, side = (t - block * KEYS) // 2, t % 2
            for c in range(width):
                target[c // COLUMNS, pair, 2 * (c % COLUMNS) + side] = np.int32(np.rint(buffer[c] * inverse[c]))


# --- queries --------------------------------------------------------------------------------------------------------------------------


@compiled(**EXACT)
def attend(start, stop, q, panels, scales, values, tops, keys, factor, out):  # type: ignore[no-untyped-def]
    """Blocks of queries against all keys, :data:`KEYS` at a time.

    Args:
        start, stop: units of work: heads times blocks of :data:`ROWS_AT_ONCE` queries.
        q: ``[clips, heads, queries, channels]``; ``out`` alike, written.
        panels, scales, values, tops: see :func:`key_codes`, :func:`value_tops`, :func:`value_codes`.
        factor: of the scores, for powers of two.

    Returns:
        Whether some query may hold NaN or infinities; the output is wrong then.
    """
    width, blocks, strange = q.shape[3], -(-q.shape[2] // ROWS_AT_ONCE), False
    sums = np.empty((ROWS_AT_ONCE, WIDTH), np.int32)
    codes, shares = np.zeros((ROWS_AT_ONCE, width), np.int16), np.zeros((ROWS_AT_ONCE, KEYS), np.int16)
    scale, state = np.empty(ROWS_AT_ONCE, np.float32), np.empty((4, ROWS_AT_ONCE), np.float32)
    result = np.empty((ROWS_AT_ONCE, values.shape[2] * COLUMNS), np.float32)
    line = np.empty(WIDTH, np.float32)
    for unit in range(start, stop):
        head, first = unit // blocks, unit % blocks * ROWS_AT_ONCE
        clip, which, count = head // q.shape[1], head % q.shape[1], min(ROWS_AT_ONCE, q.shape[2] - first)
        for r in range(count):
            loops.read(q[clip, which, first + r], line[:width])
            scale[r], broken = _token_codes(line[:width], codes[r])
            strange |= broken
            scale[r] *= factor
        state[0], state[1], result[:] = LOWEST, np.float32(0), np.float32(0)
        for block in range(values.shape[1]):
            here = min(KEYS, keys - block * KEYS)
            first_panel, last_panel = block * (KEYS // COLUMNS), block * (KEYS // COLUMNS) - -here // COLUMNS
            _tiles(codes, count, panels[head, first_panel:last_panel], width // 2, sums)
            key_scale, part = scales[head, block * KEYS : block * KEYS + here], line[:here]
            for r in range(count):
                largest = _scores(sums, r, scale[r], key_scale, part)
                share = _shares(part, largest, shares, r)
                top = max(state[0, r], largest)
                state[2, r], state[3, r] = np.exp2(state[0, r] - top), np.exp2(largest - top)
                state[0, r], state[1, r] = top, state[1, r] * state[2, r] + share * state[3, r]
            if here % 2:
                shares[:, here] = 0
            _tiles(shares, count, values[head, block], (here + 1) // 2, sums)
            _gather(sums, count, state, result)
        for r in range(count):
            _scaled(result[r], tops[head], np.float32(1) / state[1, r], line)
            loops.write(line[: out.shape[3]], out[clip, which, first + r])
    return strange


@compiled(**EXACT)
def _tiles(codes: Any, count: int, panels: Any, pairs: int, sums: Any) -> None:
    """``sums[r, n] = codes[r] . column n`` for the first ``count`` rows and ``pairs`` pairs of panels ``[panels, pairs, COLUMNS]``."""
    addresses, offset = np.empty(ROWS_AT_ONCE, np.int64), np.zeros(1, np.int64)
    for r in range(ROWS_AT_ONCE):
        addresses[r] = codes.ctypes.data + 2 * codes.shape[1] * r
    for p in range(panels.shape[0]):
        for r in range(0, count, ROWS):
            target = sums.ctypes.data + 4 * (r * WIDTH + p * COLUMNS)
            _tile(addresses.ctypes.data + 8 * r, offset.ctypes.data, 1, pairs, panels.ctypes.data + p * panels.strides[0], target, 1)


@compiled(**_finite)
def _scores(total: Any, r: int, scale: Any, key_scale: Any, line: Any) -> Any:
    """Scores of a row as floats, and the largest."""
    for j in range(line.shape[0]):
        line[j] = np.float32(total[r, j]) * (scale * key_scale[j])
    largest = LOWEST
    for j in range(line.shape[0]):
        largest = max(largest, line[j])
    return largest


@compiled(**_finite)
def _shares(line: Any, largest: Any, codes: Any, r: int) -> Any:
    """Codes of the weights ``2^(score - largest)`` of some keys, and their sum."""
    share = np.float32(0)
    for j in range(line.shape[0]):
        power = max(line[j] - largest, SMALLEST)
        whole = np.rint(power)
        f = power - whole
        raised = times_power((((POWER[4] * f + POWER[3]) * f + POWER[2]) * f + POWER[1]) * f + POWER[0], np.int32(whole))
        rounded = np.rint(raised * SHARE)
        codes[r, j] = np.int32(rounded)
        share += rounded
    return share


@compiled(**EXACT)
def _gather(total: Any, count: int, state: Any, result: Any) -> None:
    for r in range(count):
        old, new = state[2, r], state[3, r]
        for c in range(result.shape[1]):
            result[r, c] = result[r, c] * old + np.float32(total[r, c]) * new


@compiled(**EXACT)
def _scaled(result: Any, tops: Any, factor: Any, line: Any) -> None:
    for c in range(result.shape[0]):
        line[c] = result[c] * (tops[c] * factor)
