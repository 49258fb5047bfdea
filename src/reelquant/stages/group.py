"""What transforms see: one input that several layers read, and the weights that read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from reelquant.observe import InputStatistics
from reelquant.stages.layer import StageSite
from reelquant.stages.rewrite import Rewrite

Ends = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class GroupView:
    """One shared input as earlier stages left it, and the weights that read it.

    Attributes:
        low, high: ends of each channel's range over all steps, ``[1, channels]``; ``statistics`` has them per step.
        mean: ``[steps, channels]``.
        weights: ``[out, channels, *kernel]`` each, earlier scales already in.
        rotated: what ``low, high, mean`` would be after a rotation; None if no stage asked for it, or after the first rewrite.
        rounded: False if no reader rounds this input: then nothing is gained by moving its ranges.
        sites: the layers that read the input, with their specs.
        statistics: everything that was observed of the raw input, samples included.
        total: the rewrites so far.
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    weights: Sequence[Tensor]
    rotated: Ends | None = None
    rounded: bool = True
    sites: tuple[StageSite, ...] = ()
    statistics: InputStatistics | None = None
    total: Rewrite = field(default_factory=Rewrite)

    def rewritten(self, rewrite: Rewrite) -> GroupView:
        """The view after one more rewrite."""
        if rewrite.rotated:
            assert self.rotated is not None, "ranges do not rotate: they are observed on rotated inputs"
        known = self.rotated if rewrite.rotated and self.rotated else (self.low, self.high, self.mean)
        low, high, mean = (rewrite.affine(ends) for ends in known)
        weights = [rewrite.weight(weight) for weight in self.weights]
        total = self.total.then(rewrite)
        return replace(self, low=low, high=high, mean=mean, weights=weights, rotated=None, total=total)


def magnitude(group: GroupView) -> Tensor:
    """Largest magnitude of every channel over all steps: ``[channels]``."""
    return torch.maximum(group.high.amax(0), -group.low.amin(0))
