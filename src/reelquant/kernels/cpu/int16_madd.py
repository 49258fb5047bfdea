"""Integer products on x86 processors without VNNI: linear layers and convolutions over one to three axes, one loop for all of them.

A convolution is a product whose rows are made of pieces that lie apart, one for each place of its window; nothing is copied for it.
Results equal the reference but for the rounding of the output's dtype, and one input code where
:class:`~reelquant.kernels.cpu.inputs.Inputs` says so. 4-bit weights in groups are folded into integers of up to 12 bits with one scale a
row (:func:`top_of`): a weight moves by half of one of those at most.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant.formats import Granularity, Int, Quantizer, unpack
from reelquant.kernels.cpu import inputs, loops, nibbles
from reelquant.kernels.cpu.inputs import Inputs, readable
from reelquant.kernels.cpu.int8 import NATIVE, signed
from reelquant.kernels.cpu.page_alloc import alloc_pages
from reelquant.kernels.cpu.powers import ACTIVATION_CODES
from reelquant.kernels.cpu.tile import COLUMNS, PANELS, ROWS_AT_ONCE, add_up, multiply
from reelquant.kernels.operands import Operands, PackedWeight, Window

LARGEST = 255  # distance of an input code from the code of zero, at most
SUM = 2**31 - 1  # what a product can add up to
WIDEST = 2047  # weights that 4-bit codes are folded into
NO_GROUPS = np.zeros((1, 1), np.int16)
ORIGIN = np.zeros(1, np.int64)
WEIGHTS_AT_ONCE = 1 << 16  # weights that are brought into panels at a time: larger temporaries would fragment the heap


def available() -> str | None:
    """Why this machine cannot run these loops, or None."""
    capability = torch.backends.cpu.get_cpu_capability()
    return None if capability.startswith("AVX") else f"the processor has no AVX2 instructions (torch says {capability})"


def refuses(operands: Operands) -> str | None:
    """Why a layer cannot take this path, or None."""
    weight = operands.weight.quantizer
    if not isinstance(weight.format, Int) or not weight.format.signed or weight.format.bits > 8:
        return f"weights are {weight.format.name}, not symmetric integers"
    if weight.granularity.kind not in ("tensor", "channel") and not _in_groups(operands.weight):
        return f"weights have a scale per {weight.granularity}; 4-bit ones in groups of whole bytes may"
    if operands.weight.width * LARGEST * 2 ** (weight.format.bits - 1) > SUM:
        return f"rows of {operands.weight.width} weights add up to more than 32 bits hold"
    return inputs.refuses(operands) or available()


def _in_groups(weight: PackedWeight) -> bool:
    grain = weight.quantizer.granularity
    return weight.quantizer.format.bits == 4 and grain.kind == "group" and grain.size % 2 == 0


class Int16Product:
    """``y = (codes - zero) . weight * input_scale * weight_scale + bias``, with or without a window."""

    fused = tuple(ACTIVATION_CODES)

    def __init__(self, operands: Operands) -> None:
        self.inputs = Inputs(operands, np.int16)
        self.shape, self.window = operands.weight.shape, operands.window
        self.rows, self.channels, self.taps = self.shape[0], self.shape[1], math.prod(self.shape[2:])
        self.scales, self.group = NO_GROUPS, 1
        self._pack(operands.weight)
        self.bias = columns_of(torch.zeros(self.rows) if operands.bias is None else operands.bias.detach().float())
        self.sums = np.zeros(len(self.panels) * COLUMNS, np.int32)
        if operands.input is not None and operands.input.zero_point is not None:
            weights = self.panels, self.scales, self.scale, self.group
            loops.spread(add_up, len(self.panels), self.panels.size, *weights, self.sums.reshape(-1, COLUMNS))

    def _pack(self, weight: PackedWeight) -> None:
        """Bring the weight into panels; 8-bit codes, and 4-bit ones of linear layers, are kept there and nowhere else."""
        kind = weight.quantizer.granularity.kind
        if weight.quantizer.format.bits == 4 and self.window is None and self.channels % 2 == 0:
            self.scale, self.scales, self.group = _folded(weight)
            self.panels = self._panels(lambda some: weight.codes[some].unsqueeze(1))
            self.codes = self._stored_nibbles
            return
        if kind == "group":
            codes, scale = nibbles.widened(weight)
            weight = PackedWeight(codes, Quantizer(Int(8), Granularity("channel"), scale), self.shape)
        self.scale = columns_of(weight.scales[:, 0])
        self.panels = self._panels(lambda some: self._pieces(signed(weight.rows(some))))
        self.codes = self._stored_bytes if kind != "group" and weight.codes.dtype == torch.int8 else None

    def _pieces(self, codes: Tensor) -> Tensor:
        """``[rows, width]`` to ``[rows, taps, pairs, 2]``."""
        return F.pad(codes.reshape(-1, self.channels, self.taps).mT, (0, self.channels % 2)).unflatten(2, (-1, 2))

    def _panels(self, pieces: Callable[[slice], Tensor]) -> np.ndarray[Any, Any]:
        """The whole weight in panels, made from pieces of some of its rows at a time: copies of all of it would be the peak of loading."""
        step = max(WEIGHTS_AT_ONCE // max(self.channels * self.taps, 1) // COLUMNS, 1) * COLUMNS
        shape = pieces(slice(0, 1)).shape[1:]
        made = alloc_pages((-(-self.rows // COLUMNS), *shape[:2], COLUMNS, *shape[2:]), np.int8 if len(shape) == 3 else np.uint8)
        for start in range(0, self.rows, step):
            panels = panelled(pieces(slice(start, start + step)))
            made[start // COLUMNS : start // COLUMNS + len(panels)] = panels.numpy()
        return made

    def _stored_bytes(self) -> Tensor:
        pieces = unpanelled(torch.from_numpy(self.panels), self.rows).flatten(2)[..., : self.channels]
        return pieces.mT.reshape(self.rows, -1).contiguous()

    def _stored_nibbles(self) -> Tensor:
        return unpanelled(torch.from_numpy(self.panels), self.rows)[:, 0].contiguous()

    def rounding(self, operands: Operands) -> Int16Product:
        """The same weight, in the same memory, with another rounding of its inputs."""
        twin = copy.copy(self)
        twin.inputs = Inputs(operands, np.int16)
        return twin

    def __call__(self, x: Tensor, slot: int | Tensor = 0, activation: str = "") -> Tensor:
        dtype = x.dtype if x.dtype in NATIVE else torch.float32
        which = ACTIVATION_CODES[activation]
        made = self._linear(x, slot, which, dtype) if self.window is None else self._convolved(x, slot, which, dtype, self.window)
        return made if dtype == x.dtype else made.to(x.dtype)

    def _linear(self, x: Tensor, slot: int | Tensor, which: int, dtype: torch.dtype) -> Tensor:
        codes, scales, poisoned = self.inputs.rows(x, slot)
        out = torch.empty(*x.shape[:-1], self.rows, dtype=dtype)
        if poisoned:
            return out.fill_(torch.nan)
        tokens = loops.NONE if scales is None else scales
        self._product(codes, rows_of(codes.shape[0], self.channels), ORIGIN, slot, tokens, which, out)
        return out

    def _convolved(self, x: Tensor, slot: int | Tensor, which: int, dtype: torch.dtype, window: Window) -> Tensor:
        if not x.numel():
            padded = F.pad(x, window.padding) if any(window.padding) else x
            return window.convolve(padded, x.new_empty(self.shape))  # the shape of nothing, in torch's own words
        batched = x if x.ndim == len(self.shape) else x[None]
        codes, scales, poisoned = self.inputs.pixels(batched, slot, window.padding)
        starts, taps, places = pixels_of(codes.shape, self.shape[2:], window)
        out = torch.empty(len(batched), *places, self.rows, dtype=dtype)
        if poisoned:
            out.fill_(torch.nan)
        else:
            samples = loops.NONE if scales is None else np.repeat(scales, math.prod(places))
            self._product(codes, starts, taps, slot, samples, which, out)
        out = out.movedim(-1, 1)
        return out if batched is x else out[0]

    def _product(self, codes: Any, starts: Any, taps: Any, slot: Any, tokens: Any, which: int, out: Tensor) -> None:
        """Write the product of codes in any shape to ``[..., rows of the weight]``."""
        scale, zero = (1.0, 0) if self.inputs.dynamic else self.inputs.step(slot)
        units = -(-len(starts) // ROWS_AT_ONCE) * -(-len(self.panels) // PANELS)
        weights = self.panels, self.scales, self.group, self.scale, self.sums, self.bias
        numbers = zero, np.float32(scale), tokens, which
        target = loops.view(out).reshape(len(starts), self.rows)
        loops.spread(multiply, units, len(starts) * self.panels.size, codes.reshape(-1), starts, taps, *weights, *numbers, target)


def top_of(width: int) -> int:
    """The largest integer that 4-bit weights are folded into, so that no row of this many of them adds up to more than 32 bits hold."""
    return max(min(SUM // (LARGEST * width), WIDEST), 7)


def _folded(weight: PackedWeight) -> tuple[Any, Any, int]:
    """Scale of every row, scales of its groups as they are stored, pairs in a group. Rows with one scale keep their very codes."""
    rows, width = weight.shape
    size, scales = weight.quantizer.granularity.size or width, weight.scales
    one = scales[:, 0].float() if scales.shape[1] == 1 else torch.empty(rows)
    step = max(WEIGHTS_AT_ONCE // width, 1)
    for start in range(0, rows if scales.shape[1] > 1 else 0, step):
        some = slice(start, start + step)
        one[some] = nibbles.row_scale(unpack(weight.codes[some], 4, width), scales[some].float(), size, top_of(width))
    return columns_of(one), loops.view(readable(scales)), max(size // 2, 1)


def columns_of(vector: Tensor) -> np.ndarray[Any, Any]:
    """``[rows]`` to ``[panels * COLUMNS]``."""
    return F.pad(vector.float(), (0, -len(vector) % COLUMNS)).numpy()


def panelled(pieces: Tensor) -> Tensor:
    """``[rows, taps, pairs, ...]`` to ``[panels, taps, pairs, COLUMNS, ...]``, rows padded with zeros."""
    padded = F.pad(pieces, (0, 0) * (pieces.ndim - 1) + (0, -len(pieces) % COLUMNS))
    return padded.unflatten(0, (-1, COLUMNS)).movedim(1, 3).contiguous()


def unpanelled(panels: Tensor, rows: int) -> Tensor:
    """Undo :func:`panelled`."""
    return panels.movedim(3, 1).flatten(0, 1)[:rows]


@functools.lru_cache(maxsize=64)
def rows_of(count: int, channels: int) -> Any:
    """Where the codes of rows begin that lie behind each other."""
    return np.arange(count, dtype=np.int64) * channels


@functools.lru_cache(maxsize=64)
def pixels_of(shape: tuple[int, ...], kernel: tuple[int, ...], window: Window) -> tuple[Any, Any, tuple[int, ...]]:
    """Where the codes of every output place begin, where the pieces of its window lie from there, and the places of an output.

    Args:
        shape: ``[N, *padded places, C]`` of codes.
        kernel: size of the window.
    """
    clips, *sizes, channels = shape
    places = [
        (size - step * (taps - 1) - 1) // stride + 1
        for size, taps, stride, step in zip(sizes, kernel, window.stride, window.dilation, strict=True)
    ]
    steps = [math.prod(sizes[axis + 1 :]) * channels for axis in range(len(sizes))]
    begin = [np.arange(count, dtype=np.int64) * stride * step for count, stride, step in zip(places, window.stride, steps, strict=True)]
    first = np.arange(clips, dtype=np.int64) * math.prod(shape[1:])
    taps = [np.arange(count, dtype=np.int64) * spread * step for count, spread, step in zip(kernel, window.dilation, steps, strict=True)]
    return _all_sums([first, *begin]), _all_sums(taps), tuple(places)


def _all_sums(axes: list[Any]) -> Any:
    """Sums of one number of each axis, the last axis fastest."""
    return functools.reduce(lambda sums, axis: (sums[:, None] + axis).reshape(-1), axes)
