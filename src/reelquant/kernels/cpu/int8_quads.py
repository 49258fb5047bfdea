"""Integer products of small layers on x86 processors with AVX512-VNNI: linear layers and convolutions over one to three axes.

Results equal the reference but for the rounding of the output's dtype, and one input code where
:class:`~reelquant.kernels.cpu.inputs.Inputs` says so. Large layers are left to oneDNN.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant.kernels.cpu import inputs, int8
from reelquant.kernels.cpu.int8 import signed
from reelquant.kernels.cpu.page_alloc import alloc_pages
from reelquant.kernels.cpu.quad_tile import COLUMNS, ROWS_AT_ONCE, linear, multiply
from reelquant.kernels.cpu.row_product import RowProduct, bias_of, padded_columns, refuses_weight
from reelquant.kernels.operands import Operands

SMALL = 1 << 19  # weights up to which a call of oneDNN costs more than its blocking of large weights saves (docs/kernels-notebook.md)


def refuses(operands: Operands) -> str | None:
    """Why a layer cannot take this path, or None."""
    weight = operands.weight.quantizer
    if (reason := refuses_weight(operands)) is not None:
        return reason
    if weight.granularity.kind not in ("tensor", "channel"):
        return f"weights have a scale per {weight.granularity}"
    if weight.format.bits == 4 and operands.window is None:
        return "4-bit weights stay packed"
    if math.prod(operands.weight.shape) > SMALL:
        return f"more than {SMALL:,} weights"
    return inputs.refuses(operands) or int8.available()


class QuadProduct(RowProduct):
    """Four products of bytes at a time, added in 32 bits."""

    loop, call, rate = multiply, (linear,), 128

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        codes = signed(operands.weight)
        pieces = panelled(codes.reshape(-1, self.channels, self.taps))
        self.panels: np.ndarray[Any, Any] = alloc_pages(tuple(pieces.shape), np.int8)
        self.panels[:] = pieces.numpy()
        columns = operands.weight.scales[:, 0].float(), codes.sum(1, dtype=torch.int32), bias_of(operands)
        self.weight = self.panels, *(padded_columns(one, COLUMNS) for one in columns)
        self.codes = self._stored if operands.weight.codes.dtype == torch.int8 else None

    def units(self, rows: int) -> int:
        return -(-rows // ROWS_AT_ONCE)

    def _stored(self) -> Tensor:
        return unpanelled(torch.from_numpy(self.panels), self.rows, self.channels)


def panelled(codes: Tensor) -> Tensor:
    """``[rows, channels, taps]`` to ``[panels, taps, quads, COLUMNS, 4]``, rows and channels padded with zeros."""
    padded = F.pad(codes, (0, 0, 0, -codes.shape[1] % 4, 0, -len(codes) % COLUMNS))
    return padded.unflatten(1, (-1, 4)).unflatten(0, (-1, COLUMNS)).permute(0, 4, 2, 1, 3).contiguous()


def unpanelled(panels: Tensor, rows: int, channels: int) -> Tensor:
    """Undo :func:`panelled`: ``[rows, channels * taps]``."""
    codes = panels.permute(0, 3, 2, 4, 1).flatten(0, 1).flatten(1, 2)
    return codes[:rows, :channels].reshape(rows, -1).contiguous()
