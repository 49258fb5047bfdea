"""The numbers of a format in their order, whatever the order of its codes is."""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.formats import NumberFormat, Quantizer


class Levels:
    """Places of codes among the sorted numbers of a format.

    Attributes:
        last: place of the largest number; the smallest has place 0.
    """

    def __init__(self, fmt: NumberFormat) -> None:
        numbers = fmt.levels()
        self._codes = fmt.encode(numbers + 0.0)  # 0.0 turns a negative zero into the other one
        self._places = torch.searchsorted(numbers, fmt.decode(torch.arange(2**fmt.bits, dtype=torch.uint8)).contiguous())
        self.last = len(numbers) - 1

    def places(self, codes: Tensor) -> Tensor:
        """Places of codes, int64 in their shape."""
        return self._places.to(codes.device)[codes.long()].clamp(max=self.last)

    def codes(self, places: Tensor) -> Tensor:
        """Codes of places, uint8 in their shape; places beyond the ends are those of the ends."""
        return self._codes.to(places.device)[places.clamp(0, self.last)]


def within_cell(quantizer: Quantizer, target: Tensor, codes: Tensor, reach: float) -> Tensor:
    """The target ``[out, in]``, moved to where rounding gives these codes.

    Args:
        reach: how far from the number of its code a value may be, as a share of the way to the border between two numbers.
    """
    levels = Levels(quantizer.format)
    places, value = levels.places(codes), quantizer.dequantize(codes)
    below, above = (quantizer.dequantize(levels.codes(places + step)) for step in (-1, 1))
    return torch.clamp(target, value + reach * (below - value) / 2, value + reach * (above - value) / 2)
