"""Integer products on x86 processors without VNNI: linear layers and convolutions over one to three axes, one loop for all of them.

Results equal the reference but for the rounding of the output's dtype, and one input code where
:class:`~reelquant.kernels.cpu.inputs.Inputs` says so. 4-bit weights in groups are folded into integers of up to 12 bits with one scale a
row (:func:`top_of`): a weight moves by half of one of those at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant.formats import Granularity, Int, Quantizer, unpack
from reelquant.kernels.cpu import inputs, loops, nibbles
from reelquant.kernels.cpu.inputs import readable
from reelquant.kernels.cpu.int8 import signed
from reelquant.kernels.cpu.page_alloc import alloc_pages
from reelquant.kernels.cpu.row_product import LARGEST, SUM, RowProduct, bias_of, padded_columns, refuses_weight
from reelquant.kernels.cpu.tile import COLUMNS, PANELS, ROWS_AT_ONCE, add_up, multiply
from reelquant.kernels.operands import Operands, PackedWeight

WIDEST = 2047  # weights that 4-bit codes are folded into
NO_GROUPS = np.zeros((1, 1), np.int16)
WEIGHTS_AT_ONCE = 1 << 16  # weights that are brought into panels at a time: larger temporaries would fragment the heap


def available() -> str | None:
    """Why this machine cannot run these loops, or None."""
    capability = torch.backends.cpu.get_cpu_capability()
    return None if capability.startswith("AVX") else f"the processor has no AVX2 instructions (torch says {capability})"


def refuses(operands: Operands) -> str | None:
    """Why a layer cannot take this path, or None."""
    weight = operands.weight.quantizer
    if (reason := refuses_weight(operands)) is not None:
        return reason
    if weight.granularity.kind not in ("tensor", "channel") and not _in_groups(operands.weight):
        return f"weights have a scale per {weight.granularity}; 4-bit ones in groups of whole bytes may"
    return inputs.refuses(operands) or available()


def _in_groups(weight: PackedWeight) -> bool:
    grain = weight.quantizer.granularity
    return weight.quantizer.format.bits == 4 and grain.kind == "group" and grain.size % 2 == 0


class Int16Product(RowProduct):
    """Two products of 16-bit numbers at a time, added in 32 bits."""

    kind, loop, rate = np.int16, multiply, 32

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        self.scales, self.group = NO_GROUPS, 1
        self._pack(operands.weight)
        self.sums = np.zeros(len(self.panels) * COLUMNS, np.int32)
        if operands.input is not None and operands.input.zero_point is not None:
            weights = self.panels, self.scales, self.scale, self.group
            loops.spread(add_up, len(self.panels), self.panels.size, *weights, self.sums.reshape(-1, COLUMNS))
        self.weight = self.panels, self.scales, self.group, self.scale, self.sums, columns_of(bias_of(operands))

    def units(self, rows: int) -> int:
        return -(-rows // ROWS_AT_ONCE) * -(-len(self.panels) // PANELS)

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
    return padded_columns(vector.float(), COLUMNS)


def panelled(pieces: Tensor) -> Tensor:
    """``[rows, taps, pairs, ...]`` to ``[panels, taps, pairs, COLUMNS, ...]``, rows padded with zeros."""
    padded = F.pad(pieces, (0, 0) * (pieces.ndim - 1) + (0, -len(pieces) % COLUMNS))
    return padded.unflatten(0, (-1, COLUMNS)).movedim(1, 3).contiguous()


def unpanelled(panels: Tensor, rows: int) -> Tensor:
    """Undo :func:`panelled`."""
    return panels.movedim(3, 1).flatten(0, 1)[:rows]
