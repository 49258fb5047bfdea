"""Learned scales of weights: every code stays, and what a step of the codes is worth moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from reelquant.formats import Quantizer
from reelquant.nn import QuantLayer
from reelquant.reconstruct.soft import SoftLayer, SoftWeight
from reelquant.reconstruct.trained import Rated, Trained
from reelquant.stages import LayerWork, Solution, storable


def stored_scale(quantizer: Quantizer, scale: Tensor) -> Tensor:
    """Scales as a layer stores them; one that would round to zero or infinity stays that of the quantizer."""
    found = storable(quantizer, scale)
    return torch.where((found > 0) & found.isfinite(), found, quantizer.scale)


class Scaled(SoftWeight):
    """A weight of fixed codes.

    Attributes:
        logarithm: of a factor of every scale, ``[units]``.
    """

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        packed = layer.packed
        self.quantizer, self.codes = packed.quantizer, packed.unpacked()
        self.logarithm = nn.Parameter(torch.zeros_like(self.quantizer.scale))

    def _quantizer(self, *, hard: bool) -> Quantizer:
        scale = self.quantizer.scale * self.logarithm.exp()
        return replace(self.quantizer, scale=stored_scale(self.quantizer, scale.detach()) if hard else scale)

    def values(self, *, hard: bool) -> Tensor:
        return self._quantizer(hard=hard).dequantize(self.codes)

    def solution(self) -> Solution:
        return Solution(self._quantizer(hard=True), self.codes)


@dataclass(frozen=True)
class Scales(Trained):
    """Learn the scales of weights by gradients. The other attributes are those of :class:`reelquant.reconstruct.trained.Trained`.

    Papers: TuneQDM (ECCV 2024, arXiv 2401.04339): training of scales alone; Q-VDiT (arXiv 2505.22167): quantization parameters beside a
    branch (``branch_rate``) and relations of frames (``relation``). Deviations: the scales are those that the layer stores, for output
    channels or groups (TuneQDM: one for each output and one for each input channel, and others for ranges of timesteps); what is learned
    is the logarithm of a factor, so Adam's step is a relative one.
    """

    rate: float = 0.001
    name: ClassVar[str] = "scales"

    def weight_of(self, layer: QuantLayer, work: LayerWork, seed: int) -> SoftWeight:
        del work, seed
        return Scaled(layer)

    def rated(self, soft: Sequence[SoftLayer]) -> Sequence[Rated]:
        return [Rated([layer.weight.logarithm for layer in soft if isinstance(layer.weight, Scaled)], self.rate)]
