"""A weight's codes in the form in which a layer stores them, and in the dense form that kernels read."""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.formats import Kept, Quantizer, pack
from reelquant.kernels import PackedWeight
from reelquant.nn.spec import TensorLayout


def stored_codes(codes: Tensor, quantizer: Quantizer, layout: TensorLayout) -> Tensor:
    """Codes ``[out, in]`` (uint8) as the parameter of a layer."""
    if layout.kept:
        return Kept.stored(layout.kept).pack(codes, _zeros(quantizer, codes.shape, codes.device), quantizer.format.bits)
    return _dense(codes, quantizer, layout)


def dense_codes(stored: Tensor, quantizer: Quantizer, layout: TensorLayout, width: int) -> Tensor:
    """The parameter of a layer with removed weights as that of a layer without, zeros in their places; any other as it is.

    Args:
        width: codes of a row.
    """
    if not layout.kept:
        return stored
    shape = torch.Size((stored.shape[0], width))
    if stored.device.type == "meta":
        return _dense(torch.empty(shape, dtype=torch.uint8, device="meta"), quantizer, layout)
    codes = Kept.stored(layout.kept).unpack(stored, _zeros(quantizer, shape, stored.device), quantizer.format.bits)
    return _dense(codes, quantizer, layout)


def stored_again(weight: PackedWeight, layout: TensorLayout) -> Tensor:
    """The parameter that a dense weight came from."""
    return stored_codes(weight.unpacked(), weight.quantizer, layout) if layout.kept else weight.codes


def _dense(codes: Tensor, quantizer: Quantizer, layout: TensorLayout) -> Tensor:
    packed = pack(codes, quantizer.format.bits)
    return (packed ^ 128).view(torch.int8) if layout.format == "int8" else packed


def _zeros(quantizer: Quantizer, shape: torch.Size, device: torch.device) -> Tensor:
    return quantizer.codes(torch.zeros(shape, device=device))
