"""Loops over memory that torch would make in several passes, compiled by numba: one read, one write.

Every loop works on rows ``start ... stop`` and frees the interpreter, so :func:`spread` can give each of torch's threads a share. bfloat16
is read and written as its 16 bits (numba has no such type); arithmetic is float32. Loops vectorise because they touch one row at a time,
in a buffer that stays in the first-level cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from reelquant.kernels.cpu.encode import encode, ends
from reelquant.kernels.cpu.hadamard import rotate
from reelquant.kernels.cpu.options import EXACT, FAST, PART, SUMS, compiled

SMALL = 1 << 20  # elements below which a second thread costs more than it saves (benchmarks.end_to_end --cores)
PIECE = 256  # places of a plane whose codes are turned to channels last at a time
NONE = np.empty(0, np.float32)  # a vector that is not there
KINDS = {torch.float32: NONE, torch.bfloat16: np.empty(0, np.int16)}
"""dtype of a tensor -> an array of the dtype in which loops see it."""
LEAST = np.finfo(np.float32).tiny  # of scales


def view(x: Tensor) -> np.ndarray[Any, Any]:
    """A tensor as numpy sees it: the same memory, bfloat16 as int16."""
    x = x.detach() if x.requires_grad else x
    return x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def alone(elements: int) -> bool:
    """Whether a loop over so many elements stays in the caller's thread."""
    return elements <= SMALL or torch.get_num_threads() == 1


def spread(loop: Callable[..., bool | None], rows: int, elements: int, *arguments: Any) -> bool:
    """Run a loop over all rows, by as many threads as torch uses; whether any share of it answered True.

    A share that no thread has begun when the caller is done with its own is taken back: PyTorch's own threads keep a core for a while
    after each of their products, and a thread of ours would wait for it longer than the share takes.
    """
    threads = 1 if alone(elements) else min(torch.get_num_threads(), rows)
    if threads <= 1:
        return bool(loop(0, rows, *arguments))
    edges = [rows * i // threads for i in range(threads + 1)]
    shares = list(itertools.pairwise(edges))
    others = [_pool(threads - 1).submit(loop, *share, *arguments) for share in shares[1:]]
    found = [bool(loop(*shares[0], *arguments))]
    for share, other in zip(shares[1:], others, strict=True):
        found.append(bool(loop(*share, *arguments) if other.cancel() else other.result()))
    return any(found)


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "reelquant")


# --- parts of loops -------------------------------------------------------------------------------------------------------------------


def read(row: Any, buffer: Any) -> None:
    """Copy a row into a float32 buffer."""


@overload(read, jit_options=PART)
def _read_of(row: Any, buffer: Any) -> Any:
    if row.dtype == numba.types.int16:

        def from_bfloat16(row: Any, buffer: Any) -> None:
            bits = buffer.view(np.uint32)
            for j in range(row.shape[0]):
                bits[j] = np.uint32(np.uint16(row[j])) << np.uint32(16)

        return from_bfloat16

    def from_float32(row: Any, buffer: Any) -> None:
        for j in range(row.shape[0]):
            buffer[j] = row[j]

    return from_float32


def write(buffer: Any, row: Any) -> None:
    """Copy a float32 buffer into a row, rounded to nearest even if it is narrower."""


@overload(write, jit_options=PART)
def _write_of(buffer: Any, row: Any) -> Any:
    if row.dtype == numba.types.int16:

        def to_bfloat16(buffer: Any, row: Any) -> None:
            bits = buffer.view(np.uint32)
            for j in range(row.shape[0]):
                row[j] = np.int16((bits[j] + np.uint32(0x7FFF) + ((bits[j] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

        return to_bfloat16

    def to_float32(buffer: Any, row: Any) -> None:
        for j in range(row.shape[0]):
            row[j] = buffer[j]

    return to_float32


@compiled(**SUMS)
def _strange(buffer: Any) -> bool:
    """Whether a row may hold NaN or infinities: codes cannot, so the caller has to look. Its sum is finite if it does not."""
    total = np.float32(0)
    for j in range(buffer.shape[0]):
        total += buffer[j]
    return not abs(total) < np.float32(3e38)


@compiled(**EXACT)
def _covering(found: Any, levels: Any, least: Any) -> Any:
    """The smallest symmetric scale that covers what lies between two ends, at least ``least``.

    Args:
        found: the ends, a negative and a positive one.
        levels: the largest magnitudes that a negative and a positive code stand for, 128 and 127 for 8 bits.
    """
    return max(max(-found[0] / levels[0], found[1] / levels[1]), least)


# --- inputs: floats to codes ----------------------------------------------------------------------------------------------------------


@compiled(**EXACT)
def quantize_rows(start, stop, x, block, multiply, add, inverse, zero, low, high, codes):  # type: ignore[no-untyped-def]
    """``codes[i, j] = clamp(round((rotate(x[i])[j] * multiply[j] + add[j]) * inverse + zero), low, high)``.

    Args:
        x: ``[rows, channels]`` float32, or bfloat16 as int16.
        block: width of the rotated blocks, 1 for no rotation; its factor is in ``multiply`` or ``inverse``.
        multiply, add: ``[channels]`` float32, or empty.
        codes: ``[rows, channels]`` uint8 or int16, written.

    Returns:
        Whether some row may hold NaN or infinities.
    """
    strange = False
    buffer = np.empty(x.shape[1], np.float32)
    width = x.shape[1]
    for i in range(start, stop):
        if block > 1:
            read(x[i], buffer)
            rotate(buffer, block)
            strange |= encode(buffer, 0, width, multiply, add, inverse, zero, low, high, codes, i * width)
        else:
            strange |= encode(x, i * width, width, multiply, add, inverse, zero, low, high, codes, i * width)
    return strange


@compiled(**EXACT)
def quantize_tokens(start, stop, x, block, multiply, add, zero, levels, codes, scales):  # type: ignore[no-untyped-def]
    """The same with a symmetric scale for every row, found from its own values.

    Args:
        zero: the code that stands for zero.
        levels: see :func:`_covering`.
        scales: ``[rows]`` float32, written.
    """
    strange = False
    buffer, found = np.empty(x.shape[1], np.float32), np.empty(2, np.float32)
    low, high, width = zero - levels[0], zero + levels[1], x.shape[1]
    for i in range(start, stop):
        if block > 1:
            read(x[i], buffer)
            rotate(buffer, block)
            strange |= ends(buffer, 0, width, multiply, add, found)
            scales[i] = _covering(found, levels, LEAST)
            encode(buffer, 0, width, multiply, add, np.float32(1) / scales[i], zero, low, high, codes, i * width)
        else:
            strange |= ends(x, i * width, width, multiply, add, found)
            scales[i] = _covering(found, levels, LEAST)
            encode(x, i * width, width, multiply, add, np.float32(1) / scales[i], zero, low, high, codes, i * width)
    return strange


@compiled(**EXACT)
def quantize_linear(x, block, joined, multiply, add, inverse, zero, low, high, levels, codes, scales):  # type: ignore[no-untyped-def]
    """:func:`quantize_tokens` of all rows if there are scales to be written, else :func:`quantize_rows`.

    Args:
        joined: rows that may be passed as one, a power of two; fewer if they do not divide by it.
        multiply, add: ``[joined * channels]`` float32, or empty.
        codes: ``[rows * channels]``, written.
        scales: ``[rows]`` float32, written; or empty.
    """
    rows, channels = x.shape
    if scales.shape[0]:
        return quantize_tokens(
            0, rows, x, block, multiply[:channels], add[:channels], zero, levels, codes.reshape((rows, channels)), scales
        )
    while rows % joined:
        joined //= 2
    lines, length = rows // joined, joined * channels
    long, written = x.reshape((lines, length)), codes.reshape((lines, length))
    return quantize_rows(0, lines, long, block, multiply[:length], add[:length], inverse, zero, low, high, written)


@compiled(**EXACT)
def quantize_planes(start, stop, x, multiply, add, inverse, zero, low, high, offset, codes):  # type: ignore[no-untyped-def]
    """Channels first to channels last, into the inside of a padded tensor.

    Args:
        start, stop: planes of ``N * D``.
        x: ``[N, C, D, H * W]``.
        inverse: ``[N]``, of the scale of every sample.
        offset: ``[4]``, where the inside begins along depth, height and width, and the inside's width.
        codes: ``[N, D', H', W', C]`` uint8 or int16, written.
    """
    channels, depth, places = x.shape[1:]
    width = offset[3]
    affine, strange = multiply.shape[0] > 0, False
    piece = min(places, PIECE)
    lines, none = np.empty((channels, piece), codes.dtype), np.empty(0, np.float32)
    for plane in range(start, stop):
        n, d = plane // depth, plane % depth
        target = codes[n, d + offset[0]]
        for first in range(0, places, piece):
            count = min(piece, places - first)
            for c in range(channels):
                slope, level = (multiply[c] * inverse[n], add[c] * inverse[n] + zero) if affine else (inverse[n], zero)
                begin = ((n * channels + c) * depth + d) * places + first
                strange |= encode(x, begin, count, none, none, slope, level, low, high, lines, c * piece)
            for p in range(count):
                h, w = (first + p) // width, (first + p) % width
                pixel = target[h + offset[1], w + offset[2]]
                for c in range(channels):
                    pixel[c] = lines[c, p]
    return strange


@compiled(**EXACT)
def quantize_plane_quads(start, stop, x, multiply, add, inverse, zero, low, high, offset, codes):  # type: ignore[no-untyped-def]
    """The same for bytes of a multiple of four channels: four of them are written at once, in two thirds of the time.

    Args:
        codes: ``[N, D', H', W', C / 4]`` int32, written.
    """
    depth, places = x.shape[2:]
    affine, strange = multiply.shape[0] > 0, False
    piece = min(places, PIECE)
    four, words, pixels = np.empty(4 * piece, np.float32), np.empty(piece, np.int32), np.empty(piece, np.int64)
    for plane in range(start, stop):
        n, d = plane // depth, plane % depth
        target = codes[n, d + offset[0]]
        flat = target.reshape((-1, target.shape[2]))
        for first in range(0, places, piece):
            count = min(piece, places - first)
            for p in range(count):
                h, w = (first + p) // offset[3], (first + p) % offset[3]
                pixels[p] = (h + offset[1]) * target.shape[1] + w + offset[2]
            for quad in range(target.shape[2]):
                for k in range(4):
                    read(x[n, 4 * quad + k, d, first : first + count], four[k * count : (k + 1) * count])
                strange |= _strange(four[: 4 * count])
                words[:count] = 0
                for k in range(4):
                    c = 4 * quad + k
                    slope, level = (multiply[c] * inverse[n], add[c] * inverse[n] + zero) if affine else (inverse[n], zero)
                    _add_byte(four[k * count : (k + 1) * count], slope, level, low, high, np.int32(8 * k), words[:count])
                for p in range(count):
                    flat[pixels[p], quad] = words[p]
    return strange


@compiled(**EXACT)
def _add_byte(buffer: Any, inverse: Any, zero: Any, low: Any, high: Any, shift: Any, words: Any) -> None:
    for j in range(buffer.shape[0]):
        code = np.int32(min(max(np.rint(buffer[j] * inverse + zero), low), high))
        words[j] |= np.int32(code << shift)


@compiled(**EXACT)
def quantize_pixels(start, stop, x, block, multiply, add, inverse, zero, low, high, offset, codes):  # type: ignore[no-untyped-def]
    """The same from channels last, several pixels of a line joined.

    Args:
        x: ``[N, D, H, W / j, j * C]``.
        block: as in :func:`quantize_rows`.
        multiply, add: ``[j * C]``, the channels' numbers ``j`` times, or empty.
        inverse: ``[N]``, of the scale of every sample.
        offset: ``[3]``, where the inside begins along depth, height and within a line.
        codes: ``[N, D', H', W' * C]`` uint8 or int16, written.
    """
    depth, height, pieces, length = x.shape[1:]
    buffer, strange = np.empty(length, np.float32), False
    for row in range(start, stop):
        n, d, h = row // (depth * height), row // height % depth, row % height
        line = ((n * codes.shape[1] + d + offset[0]) * codes.shape[2] + h + offset[1]) * codes.shape[3] + offset[2]
        for piece in range(pieces):
            place = line + piece * length
            if block > 1:
                read(x[n, d, h, piece], buffer)
                rotate(buffer, block)
                strange |= encode(buffer, 0, length, multiply, add, inverse[n], zero, low, high, codes, place)
            else:
                first = (row * pieces + piece) * length
                strange |= encode(x, first, length, multiply, add, inverse[n], zero, low, high, codes, place)
    return strange


@compiled(**EXACT)
def write_border(codes, inside, memory):  # type: ignore[no-untyped-def]
    """The codes of zero around the inside of a padded tensor.

    Args:
        codes: ``[N, C]``, or ``[1, C]`` for all samples.
        inside: ``[6]``, begin and end of the inside along depth, height and width.
        memory: ``[N, D', H', W', C]``; written outside of it.
    """
    samples, depth, height, width, channels = memory.shape
    for n in range(samples):
        line = codes[min(n, codes.shape[0] - 1)]
        for d in range(depth):
            for h in range(height):
                within = inside[0] <= d < inside[1] and inside[2] <= h < inside[3]
                for w in range(width):
                    if not within or w < inside[4] or w >= inside[5]:
                        for c in range(channels):
                            memory[n, d, h, w, c] = line[c]


@compiled(**EXACT)
def pixel_scales(start, stop, x, block, multiply, add, levels, least, scales):  # type: ignore[no-untyped-def]
    """``scales[part]``: the smallest symmetric scale that covers the rows ``x[part]``, which are rewritten as in :func:`quantize_rows`.

    Args:
        x: ``[parts, rows, columns]`` float32, or bfloat16 as int16.
        levels, least: see :func:`_covering`.
    """
    buffer, found = np.empty(x.shape[2], np.float32), np.empty(2, np.float32)
    rows, width = x.shape[1:]
    for part in range(start, stop):
        scales[part] = least
        for row in range(rows):
            if block > 1:
                read(x[part, row], buffer)
                rotate(buffer, block)
                ends(buffer, 0, width, multiply, add, found)
            else:
                ends(x, (part * rows + row) * width, width, multiply, add, found)
            scales[part] = _covering(found, levels, scales[part])


@compiled(**EXACT)
def plane_scales(start, stop, x, multiply, add, levels, least, scales):  # type: ignore[no-untyped-def]
    """The same for every sample ``[channels, places]`` of ``x``; ``multiply`` and ``add`` are of channels, or empty."""
    found, none = np.empty(2, np.float32), np.empty(0, np.float32)
    channels, places = x.shape[1:]
    for sample in range(start, stop):
        scales[sample] = least
        for c in range(channels):
            ends(x, (sample * channels + c) * places, places, none, none, found)
            if multiply.shape[0]:
                one, other = found[0] * multiply[c] + add[c], found[1] * multiply[c] + add[c]
                found[0], found[1] = min(one, other), max(one, other)
            scales[sample] = _covering(found, levels, scales[sample])


# --- products of rows -----------------------------------------------------------------------------------------------------------------


@compiled(**EXACT)
def finish_tokens(start, stop, x, scales, bias, out):  # type: ignore[no-untyped-def]
    """``out[i] = x[i] * scales[i] + bias``: what is left of a product whose input had a scale per row. ``bias`` may be empty."""
    buffer = np.empty(x.shape[1], np.float32)
    for i in range(start, stop):
        if bias.shape[0]:
            for j in range(buffer.shape[0]):
                buffer[j] = x[i, j] * scales[i] + bias[j]
        else:
            for j in range(buffer.shape[0]):
                buffer[j] = x[i, j] * scales[i]
        write(buffer, out[i])


# --- weights: codes to floats, codes to wider codes -----------------------------------------------------------------------------------


@compiled(**EXACT)
def widen_rows(start, stop, codes, scale, out):  # type: ignore[no-untyped-def]
    """``out[i, j] = codes[i, j] * scale[i]`` for int8 codes."""
    buffer = np.empty(codes.shape[1], np.float32)
    for i in range(start, stop):
        for j in range(buffer.shape[0]):
            buffer[j] = np.float32(codes[i, j]) * scale[i]
        write(buffer, out[i])


@compiled(**EXACT)
def widen_nibbles(start, stop, packed, scale, size, zero, out):  # type: ignore[no-untyped-def]
    """The same for packed 4-bit codes with a scale per group of ``size`` (even) columns: ``[rows, groups]``."""
    columns = out.shape[1]
    buffer = np.empty(columns + 1, np.float32)
    for i in range(start, stop):
        _nibbles(packed[i], scale[i], size, zero, columns, buffer)
        write(buffer[:columns], out[i])


@compiled(**EXACT)
def fill_tiles(start, stop, nibbles, scales, step, size, codes, sums):  # type: ignore[no-untyped-def]
    """Packed 4-bit codes with group scales to int8 codes with one scale a row, and minus the sum of every row.

    Args:
        nibbles: ``[row tiles, column tiles, 16, 128]`` uint8: lines of 256 codes (64 rows, 4 columns each), first half in the low nibbles.
        scales: ``[rows, groups]`` float32, or bfloat16 as int16: as they are stored, so that nothing is kept of their quotients.
        step: ``[rows]`` float32, the scale of the row's int8 codes.
        size: columns in a group, a multiple of 4.
        codes: ``[row tiles, column tiles, 16, 256]`` int8, written.
        sums: ``[row tiles, 64]`` int32, written.
    """
    wide, line = np.empty(256, np.float32), np.empty(256, np.int32)
    some, factors = np.empty(scales.shape[1], np.float32), np.empty((scales.shape[1], 64), np.float32)
    half = nibbles.shape[3]
    for i in range(start, stop):
        total = np.zeros(256, np.int32)
        factors[:] = np.float32(0)  # rows that fill the last tile
        for row in range(64 * i, min(64 * (i + 1), scales.shape[0])):
            read(scales[row], some)
            for g in range(some.shape[0]):
                factors[g, row - 64 * i] = some[g] / step[row]
        for k in range(nibbles.shape[1]):
            for part in range(nibbles.shape[2]):
                if part == 0 or size % 64:
                    factor = factors[min((64 * k + 4 * part) // size, some.shape[0] - 1)]
                    for j in range(256):
                        wide[j] = factor[j // 4]
                packed, target = nibbles[i, k, part], codes[i, k, part]
                for j in range(half):
                    line[j] = np.int32(packed[j] & 15) - 8
                    line[j + half] = np.int32(packed[j] >> 4) - 8
                for j in range(256):
                    line[j] = np.int32(np.rint(np.float32(line[j]) * wide[j]))
                    total[j] += line[j]
                    target[j] = np.int8(line[j])
        for j in range(64):
            sums[i, j] = -(total[4 * j] + total[4 * j + 1] + total[4 * j + 2] + total[4 * j + 3])


@compiled(**EXACT)
def _nibbles(packed: Any, scale: Any, size: int, zero: Any, columns: int, buffer: Any) -> None:
    half = size // 2
    for g in range(scale.shape[0]):
        for b in range(g * half, min((g + 1) * half, packed.shape[0])):
            byte = np.int32(packed[b])
            buffer[2 * b] = np.float32((byte & 15) - zero) * scale[g]
            buffer[2 * b + 1] = np.float32((byte >> 4) - zero) * scale[g]


@compiled(**FAST)
def dot_rows(start, stop, codes, scale, x, bias, out):  # type: ignore[no-untyped-def]
    """A few input rows times int8 weights, reading the weights once: ``out[m, i] = scale[i] * codes[i] . x[m] + bias[i]``.

    Args:
        start, stop: rows of the weight.
        x: ``[few, channels]`` float32.
        bias: ``[rows]``, or empty.
        out: ``[few, rows]`` float32, written.
    """
    buffer = np.empty(codes.shape[1], np.float32)
    for i in range(start, stop):
        for j in range(buffer.shape[0]):
            buffer[j] = np.float32(codes[i, j])
        for m in range(x.shape[0]):
            total = np.float32(0)
            for j in range(buffer.shape[0]):
                total += buffer[j] * x[m, j]
            out[m, i] = total * scale[i] + (bias[i] if bias.shape[0] else np.float32(0))
