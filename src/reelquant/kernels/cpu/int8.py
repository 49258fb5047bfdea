"""Integer products through oneDNN (AVX512-VNNI, AMX): unsigned input codes times signed weight codes, scaled to floats on the way out.

Results equal the reference but for the rounding of the output's dtype, and one input code where :class:`Inputs` says so. Weights are
repacked once; the repacked copy replaces the stored one, and :meth:`codes` gives that back exactly.
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
from reelquant.kernels.cpu import inputs, loops
from reelquant.kernels.cpu.inputs import Inputs
from reelquant.kernels.operands import Operands, PackedWeight, Window

ROWS = 1024  # what oneDNN is told about the number of rows when it chooses a layout; others work as well
POST: dict[str, tuple[str, str]] = {
    "": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
    "relu": ("relu", ""),
}
"""Activation -> oneDNN's name of it and of its variant."""
NATIVE = (torch.float32, torch.bfloat16)  # dtypes that products are written in; others pass through float32
DIMS = (2, 3)  # axes of the convolutions that have integer products


def available() -> str | None:
    """Why this machine has no fast integer products, or None."""
    if not hasattr(torch.ops.onednn, "qlinear_prepack") or not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    if not torch.cpu._is_vnni_supported():
        return "the processor has no VNNI instructions"
    return None


def refuses(operands: Operands) -> str | None:
    """Why a layer cannot take this path, or None."""
    weight = operands.weight.quantizer
    if not isinstance(weight.format, Int) or not weight.format.signed:
        return f"weights are {weight.format.name}, not symmetric integers"
    if weight.granularity.kind not in ("tensor", "channel"):
        return f"weights have a scale per {weight.granularity}"
    if weight.format.bits == 4 and operands.window is None:
        return "4-bit weights stay packed"
    if operands.window is not None and len(operands.window.stride) not in DIMS:
        return "one-dimensional convolutions have no integer product in oneDNN"
    return inputs.refuses(operands) or available()


def prepare(operands: Operands) -> IntegerLinear | IntegerConvolution:
    """What computes the layer."""
    return IntegerLinear(operands) if operands.window is None else IntegerConvolution(operands)


def signed(weight: PackedWeight) -> Tensor:
    """Integer codes ``[out, width]`` int8 of a symmetric format."""
    if weight.codes.dtype == torch.int8:
        return weight.codes
    return (weight.unpacked().to(torch.int16) + int(weight.quantizer.format.low)).to(torch.int8)


class IntegerLinear:
    """``y = (codes - zero) @ weight^T * input_scale * weight_scale + bias``."""

    def __init__(self, operands: Operands) -> None:
        self.inputs = Inputs(operands)
        self.rows = operands.weight.shape[0]
        self.zero = torch.zeros(self.rows, dtype=torch.int32)
        self.bias = None if operands.bias is None else operands.bias.detach().float()
        self._pack(operands)

    def rounding(self, operands: Operands) -> IntegerLinear:
        """The same weight, in the same memory, with another rounding of its inputs."""
        twin = copy.copy(self)
        twin.inputs = Inputs(operands)
        return twin

    def _pack(self, operands: Operands) -> None:
        codes = signed(operands.weight)
        self.scale = operands.weight.quantizer.scale.float().expand(self.rows).contiguous()
        self.packed = torch.ops.onednn.qlinear_prepack(codes, [ROWS, codes.shape[1]])
        self.codes = self._codes if operands.weight.codes.dtype == torch.int8 else None

    def _codes(self) -> Tensor:
        return self.packed.to_dense().t().contiguous()

    @property
    def fused(self) -> tuple[str, ...]:
        """Activations that are applied before the output is written; not where rows are scaled afterwards."""
        return () if self.inputs.dynamic else tuple(POST)

    def __call__(self, x: Tensor, slot: int | Tensor = 0, activation: str = "") -> Tensor:
        dtype = x.dtype if x.dtype in NATIVE else torch.float32
        given, scales, poisoned = self.inputs.rows(x, slot)
        if not len(given):
            return x.new_empty(*x.shape[:-1], self.rows)
        if poisoned:
            return x.new_full((*x.shape[:-1], self.rows), torch.nan)
        codes = torch.from_numpy(given)
        out = self._product(codes, slot, dtype, activation) if scales is None else self._scaled(codes, scales, dtype)
        return out.view(*x.shape[:-1], self.rows).to(x.dtype)

    def _product(self, codes: Tensor, slot: int | Tensor, dtype: torch.dtype, activation: str) -> Tensor:
        scale, zero = self.inputs.step(slot)
        return self._multiply(codes, scale, zero, self.bias, dtype, activation)

    def _scaled(self, codes: Tensor, scales: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
        """A scale per row."""
        return _finished(self._multiply(codes, 1.0, inputs.OFFSET, None, torch.float32), scales, self.bias, dtype)

    def _multiply(self, codes: Tensor, scale: float, zero: int, bias: Tensor | None, dtype: torch.dtype, activation: str = "") -> Tensor:
        name, variant = POST[activation]
        return torch.ops.onednn.qlinear_pointwise.default(
            codes, scale, zero, self.packed, self.scale, self.zero, bias, 1.0, 0, dtype, name, [], variant
        )


def _finished(product: Tensor, scales: np.ndarray[Any, Any], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``product * scales + bias``, row by row, in one pass; float32 in the memory of the product ``[rows, out]``."""
    out = product if dtype == torch.float32 else torch.empty(product.shape, dtype=dtype)
    added = loops.NONE if bias is None else bias.numpy()
    loops.spread(loops.finish_tokens, len(out), out.numel(), product.numpy(), scales, added, loops.view(out))
    return out


class IntegerConvolution:
    """The same for convolutions, channels last. With a shift the border is written out, because zero has another code in each channel."""

    def __init__(self, operands: Operands) -> None:
        assert operands.window is not None
        self.shape, self.window = operands.weight.shape, operands.window
        self.inputs = Inputs(operands)
        self.scale = operands.weight.quantizer.scale.float().expand(self.shape[0]).contiguous()
        self.zero = torch.zeros(self.shape[0], dtype=torch.int32)
        self.bias = None if operands.bias is None else operands.bias.detach().float()
        self.border, self.padding = _border(self.window, operands.shift is not None)
        codes = signed(operands.weight).reshape(self.shape)
        size = [2, self.shape[1], *[16 + kernel for kernel in self.shape[2:]]]
        self.packed = torch.ops.onednn.qconv_prepack(
            codes, self.scale, 1.0, inputs.OFFSET, list(self.window.stride), self.padding, list(self.window.dilation), 1, size
        )
        self.codes = self._codes if operands.weight.codes.dtype == torch.int8 else None

    def rounding(self, operands: Operands) -> IntegerConvolution:
        """The same weight, in the same memory, with another rounding of its inputs."""
        twin = copy.copy(self)
        twin.inputs = Inputs(operands)
        return twin

    def _codes(self) -> Tensor:
        return self.packed.to_dense().reshape(self.shape[0], -1).contiguous()

    def __call__(self, x: Tensor, slot: int | Tensor = 0) -> Tensor:
        dtype = x.dtype if x.dtype in NATIVE else torch.float32
        batched = x if x.ndim == len(self.shape) else x[None]
        if not x.numel():
            padded = F.pad(x, self.window.padding) if any(self.window.padding) else x
            return self.window.convolve(padded, x.new_empty(self.shape))  # the shape of nothing, in torch's own words
        codes, scales, poisoned = self.inputs.pixels(batched, slot, self.border)
        if scales is None:
            out = self._convolved(codes, *self.inputs.step(slot), self.bias, dtype)
        else:
            product = self._convolved(codes, 1.0, inputs.OFFSET, None, torch.float32).movedim(1, -1).contiguous()
            places = math.prod(product.shape[1:-1])
            out = _finished(product.view(-1, product.shape[-1]), np.repeat(scales, places), self.bias, dtype)
            out = out.view(product.shape).movedim(-1, 1)
        out = torch.full_like(out, torch.nan) if poisoned else out
        return (out if batched is x else out[0]).to(x.dtype)

    def _convolved(self, codes: np.ndarray[Any, Any], scale: float, zero: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return torch.ops.onednn.qconv_pointwise.default(
            torch.from_numpy(codes).movedim(-1, 1),
            scale,
            zero,
            self.packed,
            self.scale,
            self.zero,
            bias,
            list(self.window.stride),
            self.padding,
            list(self.window.dilation),
            1,
            1.0,
            0,
            dtype,
            "none",
            [],
            "",
        )


def _border(window: Window, written: bool) -> tuple[tuple[int, ...], list[int]]:
    """Padding to write out, as ``F.pad`` takes it, and padding left to oneDNN, which pads all sides alike."""
    sides = list(zip(window.padding[-2::-2], window.padding[::-2], strict=True))
    if written or any(before != after for before, after in sides):
        return window.padding, [0] * len(window.stride)
    return (), [before for before, _ in sides] or [0] * len(window.stride)
