"""A weight's codes in the form in which a layer stores them, and in the dense form that kernels read."""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant._errors import CheckpointError
from reelquant.formats import Kept, Leading, Quantizer, pack, unpack
from reelquant.kernels import PackedWeight
from reelquant.nn.spec import TensorLayout


def stored_codes(codes: Tensor, quantizer: Quantizer, layout: TensorLayout) -> Tensor:
    """Codes ``[out, in]`` (uint8) as the parameter of a layer.

    Raises:
        CheckpointError: if a code that is not stored stands for something else than zero.
    """
    if not layout.removed:
        return _dense(codes, quantizer, layout)
    zeros = _zeros(quantizer, codes.shape, codes.device)
    codes, zeros = _stored_part(codes, zeros, layout)
    if layout.kept:
        return Kept.stored(layout.kept).pack(codes, zeros, quantizer.format.bits)
    return _dense(codes, quantizer, layout)


def dense_codes(stored: Tensor, quantizer: Quantizer, layout: TensorLayout, shape: tuple[int, int]) -> Tensor:
    """The parameter of a layer with removed weights as that of a layer without, zeros in their places; any other as it is.

    Args:
        shape: rows of the weight, and codes of a row.
    """
    if not layout.removed:
        return stored
    if stored.device.type == "meta":
        return _dense(torch.empty(shape, dtype=torch.uint8, device="meta"), quantizer, layout)
    codes = _zeros(quantizer, torch.Size(shape), stored.device)
    rows, columns = _places(shape, layout, stored.device)
    part, bits = codes[rows][:, columns], quantizer.format.bits
    part = Kept.stored(layout.kept).unpack(stored, part, bits) if layout.kept else _unpacked(stored, bits, len(columns))
    codes[rows[:, None], columns] = part
    return _dense(codes, quantizer, layout)


def stored_again(weight: PackedWeight, layout: TensorLayout) -> Tensor:
    """The parameter that a dense weight came from."""
    return stored_codes(weight.unpacked(), weight.quantizer, layout) if layout.removed else weight.codes


def _places(shape: tuple[int, ...], layout: TensorLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows and the columns that are stored."""
    return Leading.read(layout.rows).places(shape[0], device), Leading.read(layout.columns).places(shape[1], device)


def _stored_part(codes: Tensor, zeros: Tensor, layout: TensorLayout) -> tuple[Tensor, Tensor]:
    """The rows and columns that are stored, of codes and of the codes for zero; all others have to be zero."""
    if not layout.rows and not layout.columns:
        return codes, zeros
    rows, columns = _places(tuple(codes.shape), layout, codes.device)
    part = codes[rows][:, columns]
    used = codes != zeros
    if int(used.sum()) != int(used[rows][:, columns].sum()):
        raise CheckpointError("a weight has codes that are not zero in rows or columns that its layout does not store")
    return part, zeros[rows][:, columns]


def _unpacked(stored: Tensor, bits: int, width: int) -> Tensor:
    """Undo :func:`_dense`."""
    return unpack((stored ^ -128).view(torch.uint8) if stored.dtype == torch.int8 else stored, bits, width)


def _dense(codes: Tensor, quantizer: Quantizer, layout: TensorLayout) -> Tensor:
    packed = pack(codes, quantizer.format.bits)
    return (packed ^ 128).view(torch.int8) if layout.format == "int8" else packed


def _zeros(quantizer: Quantizer, shape: torch.Size, device: torch.device) -> Tensor:
    return quantizer.codes(torch.zeros(shape, device=device))
