"""The first ones of every so many rows or columns of a weight: what is stored of it where the others are zero."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from reelquant._errors import CheckpointError

MOST = 65536  # rows or columns of a part


@dataclass(frozen=True)
class Leading:
    """How many of consecutive rows (or columns) are stored: ``12:16`` is the first 12 of every 16.

    Which ones follows from the two numbers, so nothing is stored beside them, and whole rows take no bytes at all.

    Attributes:
        keep: rows of a part that are stored.
        of: rows of a part.
    """

    keep: int
    of: int

    @classmethod
    def read(cls, text: str) -> Leading:
        """Read what a layout says, ``keep:of``; an empty text stores all.

        Raises:
            CheckpointError: if it is something else, or stores none or all.
        """
        if not text:
            return cls(1, 1)
        found = re.fullmatch(r"(\d{1,5}):(\d{1,5})", str(text))
        keep, of = (int(number) for number in found.groups()) if found else (0, 0)
        if not 0 < keep < of <= MOST:
            raise CheckpointError(f"which rows or columns of a weight are stored is written KEPT:OF, as 12:16, got {text!r:.40}")
        return cls(keep, of)

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.keep < self.of else ""

    def count(self, total: int) -> int:
        """How many of so many are stored.

        Raises:
            CheckpointError: if the parts do not divide them.
        """
        if total % self.of:
            raise CheckpointError(f"a weight with {total} rows or columns is not made of parts of {self.of}")
        return total // self.of * self.keep

    def places(self, total: int, device: torch.device | str | None = None) -> Tensor:
        """Places of those that are stored, in order."""
        self.count(total)
        every = torch.arange(total, device=device)
        return every[every % self.of < self.keep]
