"""Rows of codes of which some stand for zero, stored as what they are: which codes are kept, one bit each, and the kept codes alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant._errors import CheckpointError, RecipeError
from reelquant.formats.packing import pack, packed_width, unpack

MOST = 4096  # weights of a group
NOTHING = "0:1"
"""How a layout writes that no weight of a layer is stored: its outputs are."""


@dataclass(frozen=True)
class Kept:
    """How many of consecutive weights of a row are kept: ``2:4`` is two of every four.

    Attributes:
        keep: weights of a group that are stored.
        of: weights of a group.
    """

    keep: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Kept:
        """Read ``keep:of``.

        Raises:
            RecipeError: if it is something else, or keeps all or none.
        """
        found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
        keep, of = (int(number) for number in found.groups()) if found else (0, 0)
        if not 0 < keep < of <= MOST:
            raise RecipeError(f"what is kept of weights is written KEPT:OF, as 2:4 or 42:64 with OF up to {MOST}, got {text!r:.40}")
        return cls(keep, of)

    @classmethod
    def stored(cls, text: str) -> Kept:
        """Read what a layout says: as :meth:`parse`, or :data:`NOTHING`."""
        return cls(0, 1) if text == NOTHING else cls.parse(text)

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    def groups(self, width: int) -> int:
        """Groups of a row; the last one may reach beyond its end."""
        return math.ceil(width / self.of)

    def row_bytes(self, width: int, bits: int) -> int:
        """Bytes of a stored row of so many codes of so many bits."""
        if not self.keep:
            return 0
        groups = self.groups(width)
        return packed_width(groups * self.of, 1) + packed_width(groups * self.keep, bits)

    def best(self, scores: Tensor) -> Tensor:
        """The weights of groups that are kept: those with the largest scores, the first ones of equal scores. ``[..., of]`` bool."""
        places = scores.argsort(dim=-1, descending=True, stable=True)[..., : self.keep]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, places, True)

    def in_groups(self, rows: Tensor, fill: float = 0) -> Tensor:
        """``[rows, width]`` as ``[rows, groups, of]``."""
        return F.pad(rows, (0, -rows.shape[1] % self.of), value=fill).reshape(rows.shape[0], -1, self.of)

    def pack(self, codes: Tensor, zeros: Tensor, bits: int) -> Tensor:
        """Store rows of codes.

        The bytes follow from the codes alone: where a group has more zeros than it must, the first ones count as kept.

        Args:
            codes: ``[rows, width]`` uint8.
            zeros: the codes that stand for zero, in the same shape.
            bits: of a code.

        Returns:
            ``[rows, bytes]`` uint8: a bit per weight, then the kept codes.

        Raises:
            CheckpointError: if a group has more codes that are not zero than are kept.
        """
        used = self.in_groups((codes != zeros).to(torch.uint8))
        if used.numel() and int(used.sum(-1, dtype=torch.int32).max()) > self.keep:
            raise CheckpointError(f"a weight of which {self} are kept has groups with more weights that are not zero")
        if not self.keep:
            return codes.new_empty(len(codes), 0)
        kept = self.best(used)
        values = self.in_groups(codes)[kept].reshape(len(codes), -1)
        return torch.cat([pack(kept.flatten(1).to(torch.uint8), 1), pack(values, bits)], 1)

    def unpack(self, stored: Tensor, zeros: Tensor, bits: int) -> Tensor:
        """Undo :meth:`pack`: ``[rows, width]`` uint8.

        Raises:
            CheckpointError: if the bits do not keep as many weights of every group as they should.
        """
        rows, width = zeros.shape
        groups = self.groups(width)
        place = packed_width(groups * self.of, 1)
        if stored.shape != (rows, self.row_bytes(width, bits)):
            raise CheckpointError(
                f"{width} codes of {bits} bits, {self} kept, take {self.row_bytes(width, bits)} bytes a row, got {tuple(stored.shape)}"
            )
        if not self.keep:
            return zeros.clone()
        kept = unpack(stored[:, :place].contiguous(), 1, groups * self.of).bool().reshape(rows, groups, self.of)
        if bool((kept.sum(-1) != self.keep).any()):
            raise CheckpointError(f"a weight of which {self} are kept has groups with more or fewer: its bytes are damaged")
        codes = self.in_groups(zeros)
        codes = codes.masked_scatter(kept, unpack(stored[:, place:].contiguous(), bits, groups * self.keep))
        return codes.reshape(rows, -1)[:, :width].contiguous()
