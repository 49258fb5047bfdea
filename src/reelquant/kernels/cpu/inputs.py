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
NARROW = 128  # places of a plane below which channels are brought to the end before: starting a row takes as long as the row there, too
MORE = 64  # bytes behind the codes that may be read
PARTS = 8  # in which a sample is searched for its extremes, where its places divide by it: threads share the work on a single clip
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
        kind = "token" if operands.window is None else "sample"
        if numbers.granularity.kind != kind or not numbers.format.signed or not numbers.rule.range.covers_all:
            return f"dynamic inputs of this layer are int with a scale per {kind}"
    elif numbers.granularity.kind != "tensor":
        return f"static inputs have one scale, not one per {numbers.granularity.kind}"
    return None


class Codes(NamedTuple):
    """An input as bytes.

    Attributes:
        codes: uint8 or int16; ``[rows, channels]`` of a linear layer, ``[N, *padded places, C]`` of a convolution.
        scales: ``[rows]`` float32 of dynamic inputs; ``[N]`` of a convolution.
        poisoned: the input holds NaN, which no code stands for: the output must be NaN, so that it shows.
    """

    codes: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any] | None
    poisoned: bool


class Inputs:
    """Turns inputs into codes. The rewrite is folded into one multiplication and one addition per channel.

    Results differ from the reference by at most one code, where a value lies within float32 rounding of the middle between two.

    Attributes:
        of_linear: by step, what :func:`~reelquant.kernels.cpu.loops.quantize_linear` takes before the codes.
        dtype: of the codes: uint8, where signed codes are stored with :data:`OFFSET` added, or int16, where codes are what they are.
    """

    def __init__(self, operands: Operands, dtype: type[np.generic] = np.uint8) -> None:
        numbers = operands.input
        assert numbers is not None and isinstance(numbers.format, Int)
        channels = operands.weight.shape[1]
        self.block = block_size(channels) if operands.rotate else 1
        self.multiply, self.add = folded(operands, channels, self.block**-0.5)
        by_row = operands.window is None and (self.block > 1 or numbers.rule is not None)
        self.joined = 1 if by_row else 1 << max(LINE // channels, 1).bit_length() - 1
        self.lines = np.tile(self.multiply, self.joined), np.tile(self.add, self.joined)
        self.dtype = np.dtype(dtype)
        offset = self.offset = OFFSET if numbers.format.signed and self.dtype == np.uint8 else 0
        self.low, self.high = np.float32(numbers.format.low + offset), np.float32(numbers.format.high + offset)
        self.levels = np.array([-numbers.format.low, numbers.format.high], np.float32)
        self.border = loops.LEAST if numbers.rule is None else _reach(self.add, self.levels)
        self.scales, self.zeros = _tables(numbers, offset)
        self.rounds = [
            (np.float32(1 / one), np.float32(zero), self.low, self.high) for one, zero in zip(self.scales, self.zeros, strict=True)
        ]
        rounds = self.rounds or [(np.float32(0), np.float32(offset), np.float32(0), np.float32(0))]
        self.of_linear = [(self.block, self.joined, *self.lines, *one, self.levels) for one in rounds]
        self.key = self._digest()

    @property
    def dynamic(self) -> bool:
        """Whether scales are found in the forward."""
        return not self.scales

    def step(self, slot: Any) -> tuple[float, int]:
        """Scale and zero point of a step; of units of codes, where scales are found in the forward."""
        index = self.index(slot)
        return (self.scales[index], self.zeros[index]) if self.scales else (1.0, self.offset)

    def index(self, slot: Any) -> int:
        """Which of the scales is that of a step."""
        return 0 if len(self.scales) <= 1 else int(slot)

    def rows(self, x: Tensor, slot: Any) -> Codes:
        """Codes of an input ``[..., channels]``.

        Layers of a group read the same tensor with the same numbers: the codes of the last one are kept, and given again.
        """
        index = self.index(slot)
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
        by_pixel = self._by_pixel(x)
        if not by_pixel and math.prod(x.shape[-2:]) < NARROW:
            x, by_pixel = x.movedim(1, -1).contiguous().movedim(-1, 1), True
        scales = self._of_samples(x, any(border), by_pixel) if self.dynamic else None
        numbers = self._numbers(len(x), slot, scales)
        places, dims = x.shape[2:], x.ndim - 2
        before, after = border[-2::-2] or (0,) * dims, border[::-2] or (0,) * dims
        size = [b + s + a for b, s, a in zip(before, places, after, strict=True)]
        lead = [1] * (3 - dims)
        shape = (x.shape[0], *lead, *size, x.shape[1])
        memory = scratch(math.prod(shape), self.dtype).reshape(shape)
        if any(border):
            self._write_border(memory, *numbers, [(0, 0)] * (3 - dims) + list(zip(before, after, strict=True)))
        way = self._from_last if by_pixel else self._from_first
        strange = way(x, lead, [0] * (3 - dims) + list(before), numbers, memory)
        bad = strange and bool(x.isnan().any() if scales is None else not x.isfinite().all())
        return Codes(memory.reshape(x.shape[0], *size, x.shape[1]), scales, bad)

    def _of_samples(self, x: Tensor, bordered: bool, by_pixel: bool) -> np.ndarray[Any, Any]:
        """``[N]``: the smallest scale with which symmetric codes cover a sample, its border included."""
        samples, channels = x.shape[:2]
        least = self.border if bordered else loops.LEAST
        if not by_pixel:
            plain = not self.multiply.size  # channels do not differ then, and a sample is one row
            planes, scales = loops.view(readable(x)).reshape(samples, 1 if plain else channels, -1), np.empty(samples, np.float32)
            loops.spread(loops.plane_scales, samples, planes.size, planes, self.multiply, self.add, self.levels, least, scales)
            return scales
        places = math.prod(x.shape[2:])
        joined = math.gcd(places, self.joined)
        parts = math.gcd(places // joined, PARTS)
        lines = loops.view(readable(x.movedim(1, -1))).reshape(samples * parts, places // (joined * parts), joined * channels)
        numbers = self.block, *self._lines(joined * channels), self.levels, least
        scales = np.empty(len(lines), np.float32)
        loops.spread(loops.pixel_scales, len(lines), lines.size, lines, *numbers, scales)
        return scales.reshape(samples, parts).max(1)

    def _numbers(self, samples: int, slot: Any, scales: np.ndarray[Any, Any] | None) -> tuple[Any, ...]:
        """What rounds the samples of a convolution: a reciprocal of the scale each; zero point, smallest and largest code."""
        if scales is not None:
            return np.float32(1) / scales, np.float32(self.offset), self.low, self.high
        inverse, *rest = self.rounds[0 if len(self.rounds) == 1 else int(slot)]
        return np.full(samples, inverse), *rest

    def _by_pixel(self, x: Tensor) -> bool:
        """Whether channels lie behind each other, or have to, to be rotated."""
        return self.block > 1 or x.movedim(1, -1).is_contiguous()

    def _from_last(self, x: Tensor, lead: list[int], inside: list[int], numbers: Any, memory: np.ndarray[Any, Any]) -> bool:
        """Codes of channels-last memory (of a copy, if it is not), a line of pixels at a time."""
        channels, *places = x.shape[1:]
        joined = math.gcd(places[-1], self.joined)
        data = readable(x.movedim(1, -1)).view(x.shape[0], *lead, *places[:-1], places[-1] // joined, joined * channels)
        offset = np.array([*inside[:2], inside[2] * channels])
        lines, target = x.shape[0] * math.prod(places[:-1]), memory.reshape(*memory.shape[:3], -1)
        vectors = self._lines(joined * channels)
        return loops.spread(loops.quantize_pixels, lines, x.numel(), loops.view(data), self.block, *vectors, *numbers, offset, target)

    def _from_first(self, x: Tensor, lead: list[int], inside: list[int], numbers: Any, memory: np.ndarray[Any, Any]) -> bool:
        """Codes of other memory, a plane at a time."""
        places = x.shape[2:]
        data = readable(x).view(*x.shape[:2], math.prod(places[:-2]), -1)
        offset, planes = np.array([*inside, places[-1]]), x.shape[0] * math.prod(places[:-2])
        loop, target = loops.quantize_planes, memory
        if self.dtype == np.uint8 and x.shape[1] % 4 == 0:
            loop, target = loops.quantize_plane_quads, memory.view(np.int32)
        return loops.spread(loop, planes, x.numel(), loops.view(data), self.multiply, self.add, *numbers, offset, target)

    def _write_border(
        self, memory: np.ndarray[Any, Any], inverse: np.ndarray[Any, Any], zero: Any, low: Any, high: Any, widths: list[tuple[int, int]]
    ) -> None:
        """Write the code of zero to the border; it is another one in every channel and sample where the rewrite adds something.

        Args:
            widths: places before and after, along depth, height and width.
        """
        value = inverse[:, None] * self.add + zero if self.add.size else np.full((1, memory.shape[-1]), zero)
        codes = np.clip(np.rint(value), low, high).astype(self.dtype)
        inside = [end for (before, after), size in zip(widths, memory.shape[1:4], strict=True) for end in (before, size - after)]
        loops.write_border(codes, np.array(inside), memory)

    def _digest(self) -> bytes:
        digest = hashlib.sha256(repr((self.block, self.scales, self.zeros, self.low, self.high, self.dtype)).encode())
        digest.update(self.multiply.tobytes())
        digest.update(self.add.tobytes())
        return digest.digest()


def _reach(values: np.ndarray[Any, Any], levels: np.ndarray[Any, Any]) -> np.float32:
    """The smallest symmetric scale that covers these values."""
    return np.float32(max(-values.min(initial=0) / levels[0], values.max(initial=0) / levels[1], loops.LEAST))


def scratch(size: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Memory for codes. There is one for each thread, as large as the largest input so far: fresh pages for every layer cost more than
    the codes that are written to them. A few bytes more may be read than there are codes, and are multiplied by zero."""
    forget()
    memory, needed = getattr(_last, "memory", None), size * dtype.itemsize + MORE
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
