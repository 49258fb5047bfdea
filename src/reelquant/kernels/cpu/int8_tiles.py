"""Integer products of small layers on x86 processors with AMX: linear layers and convolutions over one to three axes.

Results equal the reference but for the rounding of the output's dtype, and one input code where
:class:`~reelquant.kernels.cpu.inputs.Inputs` says so. Large layers are left to oneDNN.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant.kernels.cpu import int8_quads
from reelquant.kernels.cpu.amx_tile import BYTES, COLUMNS, CONFIG, ROWS_AT_ONCE, linear, multiply
from reelquant.kernels.cpu.int8 import signed
from reelquant.kernels.cpu.page_alloc import alloc_pages
from reelquant.kernels.cpu.row_product import RowProduct, bias_of, padded_columns
from reelquant.kernels.operands import Operands


@functools.cache
def available() -> str | None:
    """Why this machine cannot run these loops, or None. The system lets a process use the registers when it asks once."""
    able = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch do not tell
    if not (able.get("amx_tile") and able.get("amx_int8")):
        return "the processor has no AMX instructions for bytes"
    return None if torch.cpu._init_amx() else "the system does not let this process use AMX"


def refuses(operands: Operands) -> str | None:
    """Why a layer cannot take this path, or None."""
    return available() or int8_quads.refuses(operands)


class TileProduct(RowProduct):
    """Tiles of 16 rows and 16 columns, 64 bytes of each at a time."""

    loop, call, rate = multiply, (linear,), 256

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        codes = signed(operands.weight)
        pieces = panelled(codes.reshape(-1, self.channels, self.taps))
        self.panels: np.ndarray[Any, Any] = alloc_pages(tuple(pieces.shape), np.int8)
        self.panels[:] = pieces.numpy()
        columns = operands.weight.scales[:, 0].float(), codes.sum(1, dtype=torch.int32), bias_of(operands)
        self.weight = self.panels, self.channels, CONFIG, *(padded_columns(one, COLUMNS) for one in columns)
        self.codes = self._stored if operands.weight.codes.dtype == torch.int8 else None

    def units(self, rows: int) -> int:
        return -(-rows // ROWS_AT_ONCE)

    def _stored(self) -> Tensor:
        return unpanelled(torch.from_numpy(self.panels), self.rows, self.channels, self.taps)


def panelled(codes: Tensor) -> Tensor:
    """``[rows, channels, taps]`` to ``[panels, quads, COLUMNS, 4]``, places of the window one after the other, padded with zeros."""
    flat = codes.mT.flatten(1)
    padded = F.pad(flat, (0, -flat.shape[1] % BYTES, 0, -len(flat) % COLUMNS))
    return padded.unflatten(1, (-1, 4)).unflatten(0, (-1, COLUMNS)).transpose(1, 2).contiguous()


def unpanelled(panels: Tensor, rows: int, channels: int, taps: int) -> Tensor:
    """Undo :func:`panelled`: ``[rows, channels * taps]``."""
    flat = panels.transpose(1, 2).flatten(0, 1).flatten(1)[:rows, : channels * taps]
    return flat.unflatten(1, (taps, channels)).mT.reshape(rows, -1).contiguous()
