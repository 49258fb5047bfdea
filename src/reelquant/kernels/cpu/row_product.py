"""What products with a loop of our own share: linear layers and convolutions over one to three axes are one product of rows.

The rows of a convolution are made of pieces that lie apart, one for each place of its window; nothing is copied for them.
"""

from __future__ import annotations

import copy
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant.formats import Int
from reelquant.kernels.cpu import loops
from reelquant.kernels.cpu.inputs import Codes, Inputs, scratch
from reelquant.kernels.cpu.int8 import NATIVE
from reelquant.kernels.cpu.powers import ACTIVATION_CODES
from reelquant.kernels.input_code_cache import recall, remember
from reelquant.kernels.operands import Operands, Window, check_width

LARGEST = 255  # distance of an input code from the code of zero, at most
SUM = 2**31 - 1  # what a product can add up to
ORIGIN = np.zeros(1, np.int64)


def refuses_weight(operands: Operands) -> str | None:
    """Why a weight is not one of symmetric integers of up to 8 bits whose rows add up in 32 bits, or None."""
    fmt = operands.weight.quantizer.format
    if not isinstance(fmt, Int) or not fmt.signed or fmt.bits > 8:
        return f"weights are {fmt.name}, not symmetric integers"
    if operands.weight.width * LARGEST * 2 ** (fmt.bits - 1) > SUM:
        return f"rows of {operands.weight.width} weights add up to more than 32 bits hold"
    return None


class RowProduct(ABC):
    """``y = (codes - zero) . weight * input_scale * weight_scale + bias``, with or without a window.

    Attributes:
        kind: dtype of the codes of inputs.
        loop: ``(start, stop, codes, starts, taps, *weight, zero, factor, tokens, share, which, out)``, see
            :func:`~reelquant.kernels.cpu.quad_tile.multiply`.
        call: rounds the input of a linear layer and multiplies, see :func:`~reelquant.kernels.cpu.quad_tile.linear`; in a tuple, as it
            is no method. None if there is none.
        rate: products in the time in which a loop over memory passes one element: how much work is worth a second thread.
        weight: what the loop reads of the layer.
    """

    fused = tuple(ACTIVATION_CODES)
    kind: ClassVar[type[np.generic]] = np.uint8
    loop: ClassVar[Callable[..., None]]
    call: ClassVar[tuple[Callable[..., bool]] | None] = None
    rate: ClassVar[int]
    weight: tuple[Any, ...]

    def __init__(self, operands: Operands) -> None:
        self.inputs = Inputs(operands, self.kind)
        self.shape, self.window = operands.weight.shape, operands.window
        self.rows, self.channels, self.taps = self.shape[0], self.shape[1], math.prod(self.shape[2:])

    @abstractmethod
    def units(self, rows: int) -> int:
        """In how many units of work the loop multiplies so many rows."""

    def rounding(self, operands: Operands) -> RowProduct:
        """The same weight, in the same memory, with another rounding of its inputs."""
        twin = copy.copy(self)
        twin.inputs = Inputs(operands, self.kind)
        return twin

    def __call__(self, x: Tensor, slot: int | Tensor = 0, activation: str = "") -> Tensor:
        check_width(x, self.shape, self.window)
        dtype = x.dtype if x.dtype in NATIVE else torch.float32
        which = ACTIVATION_CODES[activation]
        made = self._linear(x, slot, which, dtype) if self.window is None else self._convolved(x, slot, which, dtype, self.window)
        return made if dtype == x.dtype else made.to(x.dtype)

    def _linear(self, x: Tensor, slot: int | Tensor, which: int, dtype: torch.dtype) -> Tensor:
        size = x.numel()
        work = max(size, size * self.rows // self.rate)
        if self.call is not None and size and x.dtype in loops.KINDS and x.is_contiguous() and loops.alone(work):
            made = self._in_one_call(self.call[0], x, size // self.channels, slot, which, dtype)
            if made is not None:
                return made
        codes, scales, poisoned = self.inputs.rows(x, slot)
        out = torch.empty(*x.shape[:-1], self.rows, dtype=dtype)
        if poisoned:
            return out.fill_(torch.nan)
        self._product(codes, rows_of(codes.shape[0], self.channels), ORIGIN, slot, scales, 1, which, out)
        return out

    def _in_one_call(self, call: Any, x: Tensor, rows: int, slot: int | Tensor, which: int, dtype: torch.dtype) -> Tensor | None:
        """Codes, if they are not known yet, and their product; None if the input may hold NaN."""
        inputs = self.inputs
        key = inputs.key, inputs.index(slot)
        found = recall(x, key)
        if found is None:
            codes, tokens = scratch(rows * self.channels, inputs.dtype), np.empty(rows, np.float32) if inputs.dynamic else loops.NONE
        elif found.poisoned:
            return None
        else:
            codes, tokens = found.codes.reshape(-1), loops.NONE if found.scales is None else found.scales
        out = torch.empty(*x.shape[:-1], self.rows, dtype=dtype)
        places = x.data_ptr(), loops.KINDS[x.dtype], out.data_ptr(), loops.KINDS[dtype], rows, self.rows, found is not None
        scale, zero = inputs.step(slot)
        weight = rows_of(rows, self.channels), ORIGIN, *self.weight
        if call(*places, *inputs.of_linear[key[1]], codes, tokens, *weight, zero, np.float32(scale), which):
            return None
        if found is None:
            remember(x, key, Codes(codes.reshape(rows, self.channels), tokens if inputs.dynamic else None, False))
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
            self._product(codes, starts, taps, slot, scales, math.prod(places), which, out)
        out = out.movedim(-1, 1)
        return out if batched is x else out[0]

    def _product(self, codes: Any, starts: Any, taps: Any, slot: Any, scales: Any, share: int, which: int, out: Tensor) -> None:
        """Write the product of codes in any shape to ``[..., rows of the weight]``."""
        scale, zero = self.inputs.step(slot)
        numbers = zero, np.float32(scale), loops.NONE if scales is None else scales, share, which
        target = loops.view(out).reshape(len(starts), self.rows)
        work = self.units(len(starts)), len(starts) * math.prod(self.shape) // self.rate
        loops.spread(type(self).loop, *work, codes.reshape(-1), starts, taps, *self.weight, *numbers, target)


def padded_columns(vector: Tensor, columns: int) -> np.ndarray[Any, Any]:
    """``[rows]`` to a multiple of so many, filled with zeros."""
    return F.pad(vector, (0, -len(vector) % columns)).numpy()


def bias_of(operands: Operands) -> Tensor:
    """The bias ``[rows]`` float32, zeros if there is none."""
    return torch.zeros(operands.weight.shape[0]) if operands.bias is None else operands.bias.detach().float()


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
