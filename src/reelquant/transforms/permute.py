"""Bring channels of like ranges together, so that groups of channels hold no outlier beside small values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reelquant._errors import RecipeError
from reelquant.kernels import Permutation
from reelquant.stages import GroupView, Rewrite
from reelquant.transforms.transform import Transform

ROUNDS = 30
"""Of the clustering; it ends earlier where no channel moves any more."""


@dataclass(frozen=True)
class Permute(Transform):
    """Order channels by clusters of their ranges: k-means of the pairs ``(low, high)``, clusters and the channels inside by magnitude.

    Of use where inputs have a scale for each group of channels. The input is gathered at run time.

    Attributes:
        clusters: how many; 1 leaves the order as it is.

    Paper: DGQ (arXiv 2501.04304), outlier-preserving group quantization. Deviations: theirs gives each cluster one scale, so groups
    differ in size; ours are of equal size (the granularity of the input) and may straddle two clusters. Ranges are over all steps.
    """

    clusters: int = 8
    fills: ClassVar[frozenset[str]] = frozenset({"columns"})

    def __post_init__(self) -> None:
        if self.clusters < 1:
            raise RecipeError(f"clusters counts clusters of channels, 1 or more, got {self.clusters}")

    def plan(self, group: GroupView) -> Rewrite:
        if not group.rounded or self.clusters == 1:
            return Rewrite()
        pairs = torch.stack([group.low.amin(0), group.high.amax(0)], 1)
        cluster, size = clusters_of(pairs, min(self.clusters, len(pairs))), pairs.abs().amax(1)
        typical = torch.zeros(self.clusters, device=size.device).scatter_reduce_(0, cluster, size, "mean", include_self=False)
        order = torch.argsort(size, stable=True)
        order = order[torch.argsort(typical[cluster[order]], stable=True)]
        return Rewrite(mixes=(Permutation(order),))


def clusters_of(points: Tensor, count: int) -> Tensor:
    """The cluster of each point ``[points, dims]`` by Lloyd's rounds, from starts at even ranks of their magnitude; no chance is in it."""
    ranked = points.abs().amax(1).argsort(stable=True)
    centers = points[ranked[torch.linspace(0, len(points) - 1, count, device=points.device).round().long()]].clone()
    found = torch.full((len(points),), -1, device=points.device)
    for _ in range(ROUNDS):
        nearest = (points[:, None] - centers).square().sum(2).argmin(1)
        if torch.equal(nearest, found):
            break
        found = nearest
        for number in range(count):
            members = points[found == number]
            centers[number] = members.mean(0) if len(members) else centers[number]
    return found
