"""Updates inside the rounding: a weight of low rank is added before a layer's weight is rounded, and nothing of it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from reelquant._errors import RecipeError
from reelquant.formats import Quantizer
from reelquant.nn import QuantLayer
from reelquant.reconstruct.levels import within_cell
from reelquant.reconstruct.scales import stored_scale
from reelquant.reconstruct.soft import SoftLayer, SoftWeight
from reelquant.reconstruct.through import rounded
from reelquant.reconstruct.trained import Rated, Trained
from reelquant.stages import LayerWork, Solution

REACH = 0.98
"""How near to the border of two numbers a weight may start, as a share: rounding must give the codes that are there."""


class Updated(SoftWeight):
    """A weight ``Q(W + step * B A)``, rounded in every forward with straight-through gradients.

    Attributes:
        start: ``[out, in]`` float32, the float weight moved to where rounding gives the codes that the layer has.
        left, right: ``B`` ``[out, rank]``, zero at the start, and ``A`` ``[rank, in]``; rank 0 has a full ``B`` and no ``A``.
        logarithm: of a factor of the weight's scales, ``[units]``; None if they stay.
    """

    def __init__(self, layer: QuantLayer, work: LayerWork, rank: int, generator: torch.Generator, *, scales: bool) -> None:
        super().__init__()
        packed, (rows, width) = layer.packed, work.matrix.shape
        self.quantizer = packed.quantizer
        self.start = within_cell(self.quantizer, work.matrix, packed.unpacked(), REACH)
        self.step = _steps(self.quantizer, work.matrix)
        device = self.start.device
        self.left = nn.Parameter(torch.zeros(rows, rank or width, device=device))
        right = torch.randn(rank, width, generator=generator).to(device) / max(rank, 1) ** 0.5
        self.right = nn.Parameter(right) if rank else None
        self.logarithm = nn.Parameter(torch.zeros_like(self.quantizer.scale)) if scales else None

    def _weight(self) -> Tensor:
        return self.start + self.step * (self.left if self.right is None else self.left @ self.right)

    def _quantizer(self, *, hard: bool) -> Quantizer:
        if self.logarithm is None:
            return self.quantizer
        scale = self.quantizer.scale * self.logarithm.exp()
        return replace(self.quantizer, scale=stored_scale(self.quantizer, scale.detach()) if hard else scale)

    def values(self, *, hard: bool) -> Tensor:
        if hard:
            return self.solution().values
        return rounded(self._quantizer(hard=False), self._weight())

    def solution(self) -> Solution:
        quantizer = self._quantizer(hard=True)
        return Solution(quantizer, quantizer.codes(self._weight().detach()))


def _steps(quantizer: Quantizer, like: Tensor) -> Tensor:
    """The mean distance of two neighbouring numbers at every place of a weight, in its shape: the unit of its update."""
    fmt, grain = quantizer.format, quantizer.granularity
    gap = (fmt.high - fmt.low) / (len(fmt.levels()) - 1)
    return grain.unblock((quantizer.scale[:, None] * gap).expand(grain.blocks(like).shape), like.shape)


@dataclass(frozen=True)
class StraightThrough(Trained):
    """Learn what to add to the weights before they are rounded, so that codes may move further than to a neighbour.

    The update has low rank, or none at all is asked of it, and counts in steps between numbers of the format: one learning rate serves
    all layers. Afterwards the sum is rounded into the same codes, scales and bytes that the layer had. The other attributes are those of
    :class:`reelquant.reconstruct.trained.Trained`.

    Attributes:
        rank: of the update; 0 trains every weight by itself.
        scale_rate: learning rate of the logarithms of the weight's scales; 0 leaves them as they are.

    Papers: EfficientDM (arXiv 2310.03270): updates of low rank inside the rounding, learning rates that follow the scales, scales of
    inputs for each step (``input_rate``). QuEST (arXiv 2402.03666): ``rank: 0`` on some layers (``on``). Deviations: training starts at
    the float weight, moved to where it is rounded to the codes of the solver (EfficientDM: at the rounded weight); calls are those of
    calibration, recorded once; errors are normalised as those of all reconstructions here; there are hundreds of iterations.
    """

    rate: float = 0.003
    rank: int = 32
    scale_rate: float = 0.0
    name: ClassVar[str] = "straight_through"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0 or self.scale_rate < 0:
            raise RecipeError(f"straight_through needs rank >= 0 and scale_rate >= 0, got rank={self.rank}, scale_rate={self.scale_rate}")

    def weight_of(self, layer: QuantLayer, work: LayerWork, seed: int) -> Updated:
        return Updated(layer, work, self.rank, torch.Generator().manual_seed(seed), scales=self.scale_rate > 0)

    def rated(self, soft: Sequence[SoftLayer]) -> Sequence[Rated]:
        weights = [layer.weight for layer in soft if isinstance(layer.weight, Updated)]
        updates = [part for weight in weights for part in (weight.left, weight.right) if part is not None]
        scales = [weight.logarithm for weight in weights if weight.logarithm is not None]
        return [Rated(updates, self.rate), Rated(scales, self.scale_rate)]
