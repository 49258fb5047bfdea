"""Softmax over rows of bfloat16 scores, in place and scaled on the way: two to three times as fast as torch's, and rounded once.

What makes it fast: the maximum is found among the 16-bit patterns (an order of integers, 32 in a register), and ``2^x`` is a polynomial of
its fraction with the integer part added to the exponent, which the compiler vectorises; ``exp`` of numba is a call per number.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from reelquant.kernels.cpu import loops
from reelquant.kernels.cpu.options import compiled

POWER = tuple(np.float32(c) for c in (0.9999993, 0.6931218, 0.24024744, 0.05591786, 0.0095701))
"""``2^f`` for ``-0.5 <= f <= 0.5`` by rising powers of f; off by less than 3e-6, bfloat16 by 4e-3."""
LOWEST = np.float32(-126)  # exponents of normal numbers; what is smaller rounds to nothing beside the row's largest
MAGNITUDE = np.int16(0x7FFF)
INFINITE = np.int16(0x7F80)  # bit pattern of infinity; NaNs are above

_finite: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": {"contract", "nsz", "nnan", "ninf", "arcp", "reassoc"}}


def softmax_(scores: Tensor, scale: float) -> Tensor:
    """``softmax(scores * scale)`` over the last dimension, written over the scores.

    Args:
        scores: ``[rows, keys]`` bfloat16, contiguous, at least one key.
        scale: unitless, positive.

    Returns:
        The scores. A row with NaN or plus infinity becomes NaN, as in torch.
    """
    factor = np.float32(scale * math.log2(math.e))
    loops.spread(softmax_rows, len(scores), scores.numel(), loops.view(scores), factor)
    return scores


@compiled(**loops.EXACT)
def softmax_rows(start, stop, scores, scale):  # type: ignore[no-untyped-def]
    """Rows of ``2^(scale * x)`` divided by their sums; ``scores`` are bfloat16 as int16."""
    buffer, exponents = np.empty(scores.shape[1], np.float32), np.empty(scores.shape[1], np.int32)
    for i in range(start, stop):
        top, largest = _largest(scores[i])
        loops.read(scores[i], buffer)
        if largest < INFINITE:
            _powers(buffer, exponents, scale, _as_float(top) * scale)
            _raise(buffer.view(np.int32), exponents)
            _divide(buffer, _total(buffer))
        else:
            _softmax_of_strange(buffer, scale)
        loops.write(buffer, scores[i])


@compiled(**_finite)
def _largest(row: Any) -> Any:
    """The largest number, as the bits that order bfloat16 like integers, and the largest magnitude."""
    top, largest = np.int16(-32768), np.int16(0)
    for j in range(row.shape[0]):
        bits = row[j]
        top = max(top, np.int16(bits ^ ((bits >> np.int16(15)) & MAGNITUDE)))
        largest = max(largest, np.int16(bits & MAGNITUDE))
    return top, largest


@compiled(**loops.EXACT)
def _as_float(ordered: Any) -> Any:
    bits, number = np.empty(1, np.int16), np.empty(1, np.float32)
    bits[0] = ordered ^ ((ordered >> np.int16(15)) & MAGNITUDE)
    loops.read(bits, number)
    return number[0]


@compiled(**_finite)
def _powers(buffer: Any, exponents: Any, scale: Any, top: Any) -> None:
    """Fractional parts of ``2^(scale * x - top)`` and the integer parts beside them."""
    for j in range(buffer.shape[0]):
        power = max(buffer[j] * scale - top, LOWEST)
        whole = np.rint(power)
        f = power - whole
        buffer[j] = (((POWER[4] * f + POWER[3]) * f + POWER[2]) * f + POWER[1]) * f + POWER[0]
        exponents[j] = np.int32(whole)


@compiled(**_finite)
def _raise(bits: Any, exponents: Any) -> None:
    for j in range(bits.shape[0]):
        bits[j] += exponents[j] << np.int32(23)


@compiled(**_finite)
def _total(buffer: Any) -> Any:
    total = np.float32(0)
    for j in range(buffer.shape[0]):
        total += buffer[j]
    return total


@compiled(**_finite)
def _divide(buffer: Any, total: Any) -> None:
    share = np.float32(1) / total
    for j in range(buffer.shape[0]):
        buffer[j] *= share


@compiled(**loops.EXACT)
def _softmax_of_strange(buffer: Any, scale: Any) -> None:
    """The same one number at a time, for rows that hold infinities or NaN: minus infinity is a score, the others make all NaN."""
    top, total = np.float32(-np.inf), np.float32(0)
    for j in range(buffer.shape[0]):
        value = buffer[j] * scale
        top = value if value > top or np.isnan(value) else top
    for j in range(buffer.shape[0]):
        buffer[j] = np.exp2(buffer[j] * scale - top)
        total += buffer[j]
    for j in range(buffer.shape[0]):
        buffer[j] /= total
