"""Integer products of small layers on x86 processors with AVX512-VNNI: linear layers and convolutions over one to three axes.

A convolution is a product whose rows are made of pieces that lie apart, one for each place of its window; nothing is copied for it.
Results equal the reference but for the rounding of the output's dtype, and one input code where
:class:`~reelquant.kernels.cpu.inputs.Inputs` says so. Large layers are left to oneDNN.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant.formats import Int
from reelquant.kernels.cpu import inputs, int8, loops
from reelquant.kernels.cpu.inputs import Inputs
from reelquant.kernels.cpu.int8 import NATIVE, signed
from reelquant.kernels.cpu.int16_madd import LARGEST, ORIGIN, SUM, pixels_of, rows_of
from reelquant.kernels.cpu.page_alloc import alloc_pages
from reelquant.kernels.cpu.powers import ACTIVATION_CODES
from reelquant.kernels.cpu.quad_tile import COLUMNS, ROWS_AT_ONCE, multiply
from reelquant.kernels.operands import Operands, Window

SMALL = 1 << 19  # weights up to which a call of oneDNN costs more than its blocking of large weights saves (docs/kernels-notebook.md)


def refuses(operands: Operands) -> str | None:
    """Why a layer cannot take this path, or None."""
    weight = operands.weight.quantizer
    if not isinstance(weight.format, Int) or not weight.format.signed or weight.format.bits > 8:
        return f"weights are {weight.format.name}, not symmetric integers"
    if weight.granularity.kind not in ("tensor", "channel"):
        return f"weights have a scale per {weight.granularity}"
    if weight.format.bits == 4 and operands.window is None:
        return "4-bit weights stay packed"
    if math.prod(operands.weight.shape) > SMALL:
        return f"more than {SMALL:,} weights"
    if operands.weight.width * LARGEST * 2 ** (weight.format.bits - 1) > SUM:
        return f"rows of {operands.weight.width} weights add up to more than 32 bits hold"
    return inputs.refuses(operands) or int8.available()


class QuadProduct:
    """``y = (codes - zero) . weight * input_scale * weight_scale + bias``, with or without a window."""

    fused = tuple(ACTIVATION_CODES)

    def __init__(self, operands: Operands) -> None:
        self.inputs = Inputs(operands)
        self.shape, self.window = operands.weight.shape, operands.window
        self.rows, self.channels, self.taps = self.shape[0], self.shape[1], math.prod(self.shape[2:])
        self.panels, sums = self._packed(signed(operands.weight))
        bias = torch.zeros(self.rows) if operands.bias is None else operands.bias.detach().float()
        self.weight = self.panels, _columns(operands.weight.scales[:, 0].float()), sums, _columns(bias)
        self.codes = self._stored if operands.weight.codes.dtype == torch.int8 else None

    def _packed(self, codes: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The weight in panels, and the sum of every column."""
        pieces = panelled(codes.reshape(-1, self.channels, self.taps))
        panels = alloc_pages(tuple(pieces.shape), np.int8)
        panels[:] = pieces.numpy()
        return panels, _columns(codes.sum(1, dtype=torch.int32))

    def _stored(self) -> Tensor:
        return unpanelled(torch.from_numpy(self.panels), self.rows, self.channels)

    def rounding(self, operands: Operands) -> QuadProduct:
        """The same weight, in the same memory, with another rounding of its inputs."""
        twin = copy.copy(self)
        twin.inputs = Inputs(operands)
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
        self._product(codes, rows_of(codes.shape[0], self.channels), ORIGIN, slot, scales, 1, which, out)
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
        scale, zero = (1.0, inputs.OFFSET) if scales is not None else self.inputs.step(slot)
        numbers = zero, np.float32(scale), loops.NONE if scales is None else scales, share, which
        units, products = -(-len(starts) // ROWS_AT_ONCE), len(starts) * self.panels.size
        target = loops.view(out).reshape(len(starts), self.rows)
        loops.spread(multiply, units, products, codes.reshape(-1), starts, taps, *self.weight, *numbers, target)


def _columns(vector: Tensor) -> np.ndarray[Any, Any]:
    """``[rows]`` to ``[panels * COLUMNS]``."""
    return F.pad(vector, (0, -len(vector) % COLUMNS)).numpy()


def panelled(codes: Tensor) -> Tensor:
    """``[rows, channels, taps]`` to ``[panels, taps, quads, COLUMNS, 4]``, rows and channels padded with zeros."""
    padded = F.pad(codes, (0, 0, 0, -codes.shape[1] % 4, 0, -len(codes) % COLUMNS))
    return padded.unflatten(1, (-1, 4)).unflatten(0, (-1, COLUMNS)).permute(0, 4, 2, 1, 3).contiguous()


def unpanelled(panels: Tensor, rows: int, channels: int) -> Tensor:
    """Undo :func:`panelled`: ``[rows, channels * taps]``."""
    codes = panels.permute(0, 3, 2, 4, 1).flatten(0, 1).flatten(1, 2)
    return codes[:rows, :channels].reshape(rows, -1).contiguous()
