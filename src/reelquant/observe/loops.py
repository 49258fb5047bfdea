"""Rotation and reduction in one pass over memory, compiled by numba: torch would write the rotated input and read it three times.

Extremes of a channel that holds NaN mean nothing. The range of the input that is not rotated reports it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reelquant.kernels.cpu.hadamard import rotate
from reelquant.kernels.cpu.loops import read
from reelquant.kernels.cpu.options import EXACT, FAST, compiled

ROWS = 2048  # numbers of a tile of rows that is rotated at a time: it stays in the first-level cache
TILE = 64  # positions of a plane that are rotated at a time


@compiled(**EXACT)
def rotated_rows(start: int, stop: int, x: Any, block: int, low: Any, high: Any, total: Any) -> None:
    """Extremes and sums of rotated rows, without the factor ``1 / sqrt(block)``.

    Args:
        start, stop: shares of the work, of ``shares * frames``.
        x: ``[clips, frames, positions, channels]``, float32 or bfloat16 as int16.
        block: channels that are rotated together, a power of two.
        low, high, total: ``[shares, frames, channels]``; float32, float32 and float64.
    """
    shares, frames, channels = low.shape
    rows = max(ROWS // channels, 1)
    buffer, added = np.empty((rows, channels), np.float32), np.empty(channels, np.float32)
    flat = buffer.reshape(-1)
    for item in range(start, stop):
        share, frame = item // frames, item % frames
        first, last = x.shape[2] * share // shares, x.shape[2] * (share + 1) // shares
        for clip in range(x.shape[0]):
            for row in range(first, last, rows):
                count = min(rows, last - row)
                read(x[clip, frame, row : row + count].reshape(-1), flat[: count * channels])
                rotate(flat[: count * channels], block)
                added[:] = 0
                _include(buffer[:count], low[share, frame], high[share, frame], added)
                total[share, frame] += added


@compiled(**FAST)
def _include(rows: Any, low: Any, high: Any, added: Any) -> None:
    """Extend extremes and sums by several rows."""
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            value = rows[i, j]
            low[j] = min(low[j], value)
            high[j] = max(high[j], value)
            added[j] += value


@compiled(**EXACT)
def rotated_planes(start: int, stop: int, x: Any, block: int, low: Any, high: Any, total: Any) -> None:
    """The same of ``x`` with channels before positions: ``[clips, frames, channels, positions]``.

    Extremes and sums are kept for each place of a tile and joined in the end: loops over neighbours would not vectorise.
    """
    shares, frames, channels = low.shape
    buffer = np.zeros((block, TILE), np.float32)
    kept = np.empty((3, channels, TILE), np.float32)
    least, most, added = kept[0], kept[1], kept[2]
    for item in range(start, stop):
        share, frame = item // frames, item % frames
        least[:], most[:] = np.inf, -np.inf
        for clip in range(x.shape[0] * share // shares, x.shape[0] * (share + 1) // shares):
            added[:] = 0
            for first in range(0, channels, block):
                own = slice(first, first + block)
                for tile in range(0, x.shape[3], TILE):
                    width = min(TILE, x.shape[3] - tile)
                    for channel in range(block):
                        read(x[clip, frame, first + channel, tile : tile + width], buffer[channel])
                    _mix(buffer)
                    _include_tile(buffer, width, least[own], most[own], added[own])
            for channel in range(channels):
                total[share, frame, channel] += added[channel].sum()
        for channel in range(channels):
            low[share, frame, channel] = min(low[share, frame, channel], least[channel].min())
            high[share, frame, channel] = max(high[share, frame, channel], most[channel].max())


@compiled(**EXACT)
def _mix(buffer: Any) -> None:
    """Hadamard transform along the first axis, in place, without its factor."""
    apart = 1
    while apart < buffer.shape[0]:
        pairs = buffer.reshape((-1, 2, apart * buffer.shape[1]))
        for i in range(pairs.shape[0]):
            for j in range(pairs.shape[2]):
                a, b = pairs[i, 0, j], pairs[i, 1, j]
                pairs[i, 0, j], pairs[i, 1, j] = a + b, a - b
        apart *= 2


@compiled(**FAST)
def _include_tile(values: Any, width: int, least: Any, most: Any, added: Any) -> None:
    """Extend extremes and sums of every place of a tile ``[channels, TILE]``, of which ``width`` places are filled."""
    for channel in range(values.shape[0]):
        row, low, high, total = values[channel], least[channel], most[channel], added[channel]
        for j in range(width):
            low[j] = min(low[j], row[j])
            high[j] = max(high[j], row[j])
            total[j] += row[j]
