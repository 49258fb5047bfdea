"""Float inputs to 8-bit codes in one pass: rotation, shift, scale and rounding together, and once for layers that read the same tensor."""

from __future__ import annotations

import hashlib
import math
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reelquant.formats import Int
from reelquant.kernels.cpu import loops
from reelquant.kernels.hadamard import block_size
from reelquant.kernels.input_code_cache import forget, recall, remember
from reelquant.kernels.operands import InputQuant, Operands

LINE = 2048  # numbers that a loop should meet in one row: narrow rows are joined, or starting each would take as long as the row
OFFSET = 128  # signed codes are stored with it: oneDNN's fast products take unsigned inputs
_last = threading.local()  # memory of codes, per thread


def refuses(operands: Operands) -> str | None:
    """Why these inputs cannot become bytes, or None."""
    numbers = operands.input
    if numbers is None:
        return "the input stays float"
    if not isinstance(numbers.format, Int) or numbers.format.bits > 8:
        return f"inputs are {numbers.format.name}, not integers"
    if numbers.rule is not None:
        plain = numbers.granularity.kind == "token" and numbers.format.signed and numbers.rule.range.covers_all
        if not plain or operands.window is not None:
            return "dynamic inputs are int with a scale per token, in linear layers"
    elif numbers.granularity.kind != "tensor":
        return f"static inputs have one scale, not one per {numbers.granularity.kind}"
    if operands.rotate and operands.window is not None:
        return "the input of a convolution is rotated"
    return None


class Codes(NamedTuple):
    """An input as bytes.

    Attributes:
        codes: uint8 or int16; ``[rows, channels]`` of a linear layer, ``[N, *padded places, C]`` of a convolution.
        scales: ``[rows]`` float32 of dynamic inputs.
        poisoned: the input holds NaN, which no code stands for: the output must be NaN, so that it shows.
    """

    codes: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any] | None
    poisoned: bool


class Inputs:
    """Turns inputs into codes. The rewrite is folded into one multiplication and one addition per channel.

    Results differ from the reference by at most one code, where a value lies within float32 rounding of the middle between two.

    Attributes:
        dtype: of the codes: uint8, where signed codes are stored with :data:`OFFSET` added, or int16, where codes are what they are.
    """

    def __init__(self, operands: Operands, dtype: type[np.generic] = np.uint8) -> None:
        numbers = operands.input
        assert numbers is not None and isinstance(numbers.format, Int)
        channels = operands.weight.shape[1]
        self.block = block_size(channels) if operands.rotate else 1
        self.multiply, self.add = folded(operands, channels, self.block**-0.5)
        self.joined = 1 if self.block > 1 or numbers.scale is None else 1 << max(LINE // channels, 1).bit_length() - 1
        self.lines = np.tile(self.multiply, self.joined), np.tile(self.add, self.joined)
        self.dtype = np.dtype(dtype)
        offset = self.offset = OFFSET if numbers.format.signed and self.dtype == np.uint8 else 0
        self.low, self.high = np.float32(numbers.format.low + offset), np.float32(numbers.format.high + offset)
        self.levels = np.array([-numbers.format.low, numbers.format.high], np.float32)
        self.scales, self.zeros = _tables(numbers, offset)
        self.rounds = [
            (np.float32(1 / one), np.float32(zero), self.low, self.high) for one, zero in zip(self.scales, self.zeros, strict=True)
        ]
        self.key = self._digest()

    @property
    def dynamic(self) -> bool:
        """Whether scales are found in the forward."""
        return not self.scales

    def step(self, slot: Any) -> tuple[float, int]:
        """Scale and zero point of a step."""
        index = 0 if len(self.scales) == 1 else int(slot)
        return self.scales[index], self.zeros[index]

    def rows(self, x: Tensor, slot: Any) -> Codes:
        """Codes of an input ``[..., channels]``.

        Layers of a group read the same tensor with the same numbers: the codes of the last one are kept, and given again.
        """
        index = 0 if len(self.scales) <= 1 else int(slot)
        if (kept := recall(x, (self.key, index))) is not None:
            return kept
        found = self._encode(x, index)
        remember(x, (self.key, index), found)
        return found

    def _encode(self, x: Tensor, index: int) -> Codes:
        channels, data = x.shape[-1], loops.view(readable(x))
        rows = data.size // channels if channels else 0
        codes = scratch(data.size, self.dtype).reshape(rows, channels)
        if self.dynamic:
            common = (rows, data.size, data.reshape(rows, channels), self.block, self.multiply, self.add)
            scales = np.empty(rows, np.float32)
            strange = loops.spread(loops.quantize_tokens, *common, np.float32(self.offset), self.levels, codes, scales)
            return Codes(codes, scales, strange and not bool(x.isfinite().all()))
        joined = math.gcd(rows, self.joined)
        lines = rows // joined, joined * channels
        numbers = (*self._lines(lines[1]), *self.rounds[index])
        strange = loops.spread(loops.quantize_rows, lines[0], data.size, data.reshape(lines), self.block, *numbers, codes.reshape(lines))
        return Codes(codes, None, strange and bool(x.isnan().any()))

    def _lines(self, length: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Factors and summands for rows that were joined to this length."""
        return self.lines[0][:length], self.lines[1][:length]

    def pixels(self, x: Tensor, slot: Any, border: tuple[int, ...]) -> Codes:
        """Codes of a convolution's input, channels last.

        Args:
            x: ``[N, C, *places]``.
            border: places to add, as ``F.pad`` takes them; they get the code of zero, channel by channel.

        Returns:
            Codes ``[N, *padded places, C]``.
        """
        index = 0 if len(self.scales) == 1 else int(slot)
        numbers = self.rounds[index]
        places, dims = x.shape[2:], x.ndim - 2
        before, after = border[-2::-2] or (0,) * dims, border[::-2] or (0,) * dims
        size = [b + s + a for b, s, a in zip(before, places, after, strict=True)]
        lead = [1] * (3 - dims)
        shape = (x.shape[0], *lead, *size, x.shape[1])
        memory = scratch(math.prod(shape), self.dtype).reshape(shape)
        if any(border):
            memory[:] = self._zero_codes(index)
        way = self._from_last if x.movedim(1, -1).is_contiguous() else self._from_first
        strange = way(x, lead, [0] * (3 - dims) + list(before), numbers, memory)
        return Codes(memory.reshape(x.shape[0], *size, x.shape[1]), None, strange and bool(x.isnan().any()))

    def _from_last(self, x: Tensor, lead: list[int], inside: list[int], numbers: Any, memory: np.ndarray[Any, Any]) -> bool:
        """Codes of channels-last memory, a line of pixels at a time."""
        channels, *places = x.shape[1:]
        joined = math.gcd(places[-1], self.joined)
        data = readable(x.movedim(1, -1)).view(x.shape[0], *lead, *places[:-1], places[-1] // joined, joined * channels)
        offset = np.array([*inside[:2], inside[2] * channels])
        lines, target = x.shape[0] * math.prod(places[:-1]), memory.reshape(*memory.shape[:3], -1)
        vectors = self._lines(joined * channels)
        return loops.spread(loops.quantize_pixels, lines, x.numel(), loops.view(data), *vectors, *numbers, offset, target)

    def _from_first(self, x: Tensor, lead: list[int], inside: list[int], numbers: Any, memory: np.ndarray[Any, Any]) -> bool:
        """Codes of other memory, a plane at a time."""
        places = x.shape[2:]
        data = readable(x).view(*x.shape[:2], math.prod(places[:-2]), -1)
        offset, planes = np.array([*inside, places[-1]]), x.shape[0] * math.prod(places[:-2])
        vectors = (self.multiply, self.add)
        return loops.spread(loops.quantize_planes, planes, x.numel(), loops.view(data), *vectors, *numbers, offset, memory)

    def _zero_codes(self, index: int) -> np.ndarray[Any, Any]:
        """The code of zero, by channels where they differ."""
        inverse, zero, low, high = self.rounds[index]
        value = self.add * inverse if self.add.size else np.zeros(1, np.float32)
        return np.clip(np.rint(value + zero), low, high).astype(self.dtype)

    def _digest(self) -> bytes:
        digest = hashlib.sha256(repr((self.block, self.scales, self.zeros, self.low, self.high, self.dtype)).encode())
        digest.update(self.multiply.tobytes())
        digest.update(self.add.tobytes())
        return digest.digest()


def scratch(size: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Memory for codes. There is one for each thread, as large as the largest input so far: fresh pages for every layer cost more than
    the codes that are written to them. A code more may be read than there are, and is multiplied by zero."""
    forget()
    memory, needed = getattr(_last, "memory", None), (size + 1) * dtype.itemsize
    if memory is None or memory.size < needed:
        memory = _last.memory = np.empty(needed, np.uint8)
    return memory[: size * dtype.itemsize].view(dtype)


def readable(x: Tensor) -> Tensor:
    """Contiguous, and in a dtype that loops read."""
    return (x if x.dtype in (torch.bfloat16, torch.float32) else x.float()).contiguous()


def folded(operands: Operands, channels: int, factor: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """``(factor * x - shift) / scale`` as ``x * multiply + add``; empty vectors if nothing is done."""
    if not operands.rewritten:
        return loops.NONE, loops.NONE
    scale = torch.ones(channels) if operands.scale is None else operands.scale.float()
    shift = torch.zeros(channels) if operands.shift is None else operands.shift.float()
    return (factor / scale).numpy(), (-shift / scale).numpy()


def _tables(numbers: InputQuant, offset: int) -> tuple[list[float], list[int]]:
    """Scale and zero point of every step; empty for dynamic inputs."""
    if numbers.scale is None:
        return [], []
    scales = numbers.scale[:, 0].tolist()
    zeros = [0.0] * len(scales) if numbers.zero_point is None else numbers.zero_point[:, 0].tolist()
    return scales, [int(zero) + offset for zero in zeros]
