"""Move difficulty between activations and weights, by as much as lowers the error of the layers that read the input."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from reelquant._errors import RecipeError
from reelquant.branches.lowrank import Lowrank
from reelquant.observe.rows import ROWS
from reelquant.stages import GroupView, Rewrite, magnitude
from reelquant.transforms.output_error import output_error
from reelquant.transforms.scale import largest_weights, normalised
from reelquant.transforms.transform import Transform

COPIES = 4
"""Of one weight and of what sampled rows become, at the peak of an error. An assumption, not measured."""


@dataclass(frozen=True)
class ScaleSearch(Transform):
    """Divide each channel by ``max|x|^a / max|W|^b``, the pair of exponents chosen for every group by its output error.

    ``max|x|`` is over all denoising steps. The error is that of all layers of the group on sampled rows, rounded as the recipe says
    (:func:`reelquant.transforms.output_error.output_error`). Tried are ``b = 1 - a`` for ``grid + 1`` even exponents ``a`` from 0 to 1, and
    no scale at all.

    Attributes:
        grid: intervals of the exponents.
        lone: try every exponent with ``b = 0``, too.
        rank, share: a low-rank branch that follows in the recipe, as :class:`~reelquant.branches.lowrank.Lowrank` has them: its directions
            stay float in the error.

    Paper: DiTAS (WACV 2025, arXiv 2409.07756), temporal-aggregated smoothing with a grid search by layer; SVDQuant (arXiv 2411.05007),
    whose search has ``lone`` and the branch. Deviations: layers that share an input share the exponents; errors are of 1024 sampled rows
    of all steps (DiTAS: every token of 50 steps); weights are rounded to nearest in the search; scales have a geometric mean of 1.
    """

    grid: int = 20
    lone: bool = False
    rank: int = 0
    share: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.grid <= 1000:
            raise RecipeError(f"grid counts intervals of the exponents, 1 to 1000, got {self.grid}")
        Lowrank(self.rank, self.share)

    def peak_bytes(self, rows: int, width: int) -> int:
        return COPIES * 4 * (rows * width + ROWS * (rows + 2 * width))

    def plan(self, group: GroupView) -> Rewrite:
        if group.rows is None or not group.sites:
            return Rewrite()
        rank, best, least = Lowrank(self.rank, self.share).rank_of, Rewrite(), math.inf
        for candidate in (Rewrite(), *(Rewrite(scale=scale) for scale in self._scales(group))):
            if (error := output_error(group, candidate, rank)) < least:
                best, least = candidate, error
        return best

    def _scales(self, group: GroupView) -> list[Tensor]:
        inputs, weights = magnitude(group).clamp(min=1e-5), largest_weights(group)
        exponents = [place / self.grid for place in range(self.grid + 1)]
        pairs = [(a, 1 - a) for a in exponents] + [(a, 0.0) for a in exponents[1:] if self.lone]
        return [normalised(inputs**a / weights**b) for a, b in pairs]
