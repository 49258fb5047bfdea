"""Float inputs to integers with a scale for every group of channels, or for every token, found in the forward.

Numbers of small floats are multiples of their smallest one: those of e2m1 are 0, 1, 2, 3, 4, 6, 8 and 12 halves. So they are integers with
another scale, and products of them are integer products.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reelquant.formats import Int, NumberFormat, dynamic
from reelquant.kernels.cpu import loops
from reelquant.kernels.cpu.hadamard import rotate
from reelquant.kernels.cpu.inputs import folded, readable, scratch
from reelquant.kernels.cpu.levels import HALVES, MOST
from reelquant.kernels.cpu.options import EXACT, compiled
from reelquant.kernels.hadamard import block_size
from reelquant.kernels.input_code_cache import recall, remember
from reelquant.kernels.operands import InputQuant, Operands

LARGEST = 1024  # of an integer that stands for a number of an input


class Multiples(NamedTuple):
    """Numbers of a format as multiples of one.

    Attributes:
        unit: the smallest number above zero.
        values: ``[2 ** bits]`` int16, what every code stands for, in units.
    """

    unit: float
    values: np.ndarray[Any, Any]


@functools.lru_cache(maxsize=32)
def multiples(fmt: NumberFormat, largest: int) -> Multiples | None:
    """The numbers of a format as integers up to ``largest``, or None if they are not multiples of one."""
    if fmt.bits > 8 or fmt.table is not None:
        return None
    levels = fmt.decode(torch.arange(2**fmt.bits, dtype=torch.uint8))
    unit = float(levels[levels > 0].min())
    values = levels / unit
    if bool((values != values.round()).any()) or float(values.abs().max()) > largest:
        return None
    return Multiples(unit, values.to(torch.int16).numpy())


def refuses(operands: Operands) -> str | None:
    """Why these inputs cannot become such integers, or None."""
    numbers = operands.input
    if numbers is None:
        return "the input stays float"
    if numbers.rule is None or numbers.granularity.kind not in ("group", "token"):
        return "inputs have no scales per group or token that are found at run time"
    if operands.window is not None:
        return "convolutions have no scales per group of channels here"
    if multiples(numbers.format, LARGEST) is None:
        return f"numbers of {numbers.format.name} are not multiples of one of them up to {LARGEST}"
    return None


class GroupCodes(NamedTuple):
    """An input as integers.

    Attributes:
        codes: ``[rows, channels]`` int16.
        scales: ``[rows, groups]`` float32.
        poisoned: the input holds NaN or infinities, which have no code.
    """

    codes: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any]
    poisoned: bool


class GroupInputs:
    """Turns inputs into codes. Scales are found by the very code of the reference. A code differs from the reference's by at most one, and
    only where a value lies within float32 rounding of the middle between two.

    Attributes:
        unit: what a code of 1 stands for, before the scale.
        size: channels that share a scale.
    """

    def __init__(self, operands: Operands) -> None:
        assert operands.input is not None
        self.numbers: InputQuant = operands.input
        fmt, channels, grain = self.numbers.format, operands.weight.shape[1], self.numbers.granularity
        found = multiples(fmt, LARGEST)
        assert found is not None
        self.unit = found.unit
        self.size = min(grain.size, channels) if grain.kind == "group" else channels
        self.block = block_size(channels) if operands.rotate else 1
        self.multiply, self.add = folded(operands, channels, self.block**-0.5)
        if operands.rotate and not self.multiply.size:
            self.multiply, self.add = np.full(channels, self.block**-0.5, np.float32), np.zeros(channels, np.float32)
        self.ends = np.array([fmt.low, fmt.high], np.float32)
        self.middles, self.values = loops.NONE, found.values[:0]
        if not isinstance(fmt, Int):
            self.middles, self.values = _table(fmt, found)
        self.key = self._digest()

    def rows(self, x: Tensor) -> GroupCodes:
        """Codes of an input ``[..., channels]``; the last ones are kept for layers that read the same tensor with the same numbers."""
        if (kept := recall(x, (self.key, 0))) is not None:
            return kept
        found = self._encode(x)
        remember(x, (self.key, 0), found)
        return found

    def _encode(self, x: Tensor) -> GroupCodes:
        channels = x.shape[-1]
        data = loops.view(readable(x)).reshape(-1, channels)
        rows = torch.empty(data.shape, dtype=torch.float32)
        loops.spread(rewrite_rows, len(data), data.size, data, self.block, self.multiply, self.add, rows.numpy())
        assert self.numbers.rule is not None
        quantizer = dynamic(self.numbers.rule, rows)
        scales = quantizer.scale.reshape(len(data), -1).numpy()
        zeros = loops.NONE.reshape(0, 1) if quantizer.zero_point is None else quantizer.zero_point.reshape(len(data), -1).numpy()
        codes = scratch(data.size, np.dtype(np.int16)).reshape(data.shape)
        numbers = scales, zeros, self.size, self.ends, self.middles, self.values
        loops.spread(encode_groups, len(data), data.size, rows.numpy(), *numbers, codes)
        return GroupCodes(codes, scales, not bool(np.isfinite(scales).all()) or bool(rows.isnan().any()))

    def _digest(self) -> bytes:
        digest = hashlib.sha256(repr((self.block, self.numbers.rule, self.size)).encode())
        digest.update(self.multiply.tobytes() + self.add.tobytes())
        return digest.digest()


def _table(fmt: NumberFormat, found: Multiples) -> tuple[Any, Any]:
    """Ends of what becomes each number, ``[MOST]`` float32, and the numbers in order, ``[MOST + 1]`` int16, in units.

    A number in the middle between two goes where the format puts it (to the even one of e2m1).
    """
    order = np.unique(found.values)
    middles = torch.from_numpy((order[1:].astype(np.float32) + order[:-1]) * np.float32(found.unit / 2))
    upper = torch.from_numpy(order[1:].astype(np.float32)) * found.unit
    ends = torch.where(fmt.round(middles) == upper, torch.nextafter(middles, torch.full_like(middles, -np.inf)), middles)
    padded, values = np.full(MOST, np.inf, np.float32), np.full(MOST + 1, order[-1], np.int16)
    padded[: len(ends)], values[: len(order)] = ends.numpy(), order
    return padded, values


@compiled(**EXACT)
def rewrite_rows(start, stop, x, block, multiply, add, out):  # type: ignore[no-untyped-def]
    """``out[i] = rotate(x[i]) * multiply + add``.

    Args:
        x: ``[rows, channels]`` float32, or bfloat16 as int16.
        block: width of the rotated blocks, 1 for no rotation; its factor is in ``multiply``.
        multiply, add: ``[channels]`` float32, or empty.
        out: ``[rows, channels]`` float32, written.
    """
    for i in range(start, stop):
        line = out[i]
        loops.read(x[i], line)
        if block > 1:
            rotate(line, block)
        if multiply.shape[0]:
            for j in range(line.shape[0]):
                line[j] = line[j] * multiply[j] + add[j]


@compiled(**EXACT)
def encode_groups(start, stop, x, scales, zeros, size, ends, middles, values, codes):  # type: ignore[no-untyped-def]
    """``codes[i, j]``: the integer nearest to ``x[i, j] / scales[i, j // size]``, or the number of a table.

    Args:
        x: ``[rows, channels]`` float32.
        scales: ``[rows, groups]`` float32.
        zeros: the same, codes that stand for zero and are taken off again; or no rows.
        ends: the smallest and largest code of integers.
        middles, values: see :func:`_table`; empty for integers.
        codes: ``[rows, channels]`` int16, written.
    """
    for i in range(start, stop):
        for g in range(scales.shape[1]):
            scale = scales[i, g]
            zero = zeros[i, g] if zeros.shape[0] else np.float32(0)
            for j in range(g * size, min((g + 1) * size, x.shape[1])):
                value = x[i, j] / scale
                if middles.shape[0]:
                    first = 0
                    for half in HALVES:  # how many ends are smaller, without a branch that cannot be foretold
                        first += half if middles[first + half - 1] < value else 0
                    codes[i, j] = values[first]
                else:
                    codes[i, j] = np.int16(min(max(np.rint(value + zero), ends[0]), ends[1]) - zero)
