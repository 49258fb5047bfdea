"""What transforms see: one input that several layers read, and the weights that read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from reelquant._errors import UnsupportedError
from reelquant.observe import InputStatistics
from reelquant.stages.layer import StageSite
from reelquant.stages.ranges import ends
from reelquant.stages.rewrite import Rewrite

Ends = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class GroupView:
    """One shared input as earlier stages left it, and the weights that read it.

    Attributes:
        low, high: ends of each channel's range over all steps, ``[1, channels]``; :meth:`by_step` has them per step.
        mean: ``[steps, channels]``.
        weights: ``[out, channels, *kernel]`` each, earlier rewrites already in.
        rotated: what ``low, high, mean`` would be after a rotation; None if no stage asked for it, or after the first rewrite.
        rounded: False if no reader rounds this input: then nothing is gained by moving its ranges.
        sites: the layers that read the input, with their specs.
        statistics: everything that was observed of the raw input.
        total: the rewrites so far.
        rows: sampled rows of the raw input, ``[rows, channels * taps]``, or None; :attr:`samples` has them as earlier stages left them.
        unseen: whether ranges are extended to what later clips may reach.
        seam: the first channel behind the place where a skip connection joins the raw input, or None.
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
    rows: Tensor | None = None
    unseen: bool = False
    seam: int | None = None

    @property
    def channels(self) -> int:
        """Of the input."""
        return self.low.shape[-1]

    @property
    def samples(self) -> Tensor:
        """Sampled rows of the input, ``[rows, channels * taps]``: what the weights multiply."""
        assert self.rows is not None, "transforms are planned from samples"
        return self.total.per_tap(self.rows.shape[1] // self.channels).input(self.rows)

    def by_step(self) -> tuple[Tensor, Tensor]:
        """Ends of each channel's range at every step that was seen, ``[steps, channels]`` each.

        Raises:
            UnsupportedError: after a rotation that follows other rewrites; nothing was observed of that.
        """
        assert self.statistics is not None
        found = ends(self.total, self.statistics, per_step=True, unseen=self.unseen)
        if found is None:
            raise UnsupportedError("ranges per step are known before a rotation in blocks or with signs; put what needs them before it")
        return found[0].amin(1), found[1].amax(1)

    def rewritten(self, rewrite: Rewrite) -> GroupView:
        """The view after one more rewrite."""
        if rewrite.identity:
            return self
        weights = [rewrite.weight(weight) for weight in self.weights]
        after = replace(self, weights=weights, rotated=None, total=self.total.then(rewrite))
        if self.rotated is not None and rewrite.rotated:
            low, high, mean = (rewrite.affine(known) for known in self.rotated)
        elif not any(mix.kind == "rotate" for mix in rewrite.mixes):
            low, high = rewrite.ends(self.low, self.high)
            mean = replace(rewrite, taps=1).input(self.mean)
        elif self.rows is None and self.statistics is None:  # a recipe without calibration
            return after
        else:
            low, high = after.sampled_ends()
            mean = replace(rewrite, taps=1).input(self.mean)
        return replace(after, low=low, high=high, mean=mean)

    def sampled_ends(self) -> tuple[Tensor, Tensor]:
        """Ends of the ranges of sampled values, ``[1, channels]``."""
        values = self.samples.unflatten(-1, (self.channels, -1)).movedim(-1, 1).flatten(0, 1)
        return values.amin(0, keepdim=True), values.amax(0, keepdim=True)


def magnitude(group: GroupView) -> Tensor:
    """Largest magnitude of every channel over all steps: ``[channels]``."""
    return torch.maximum(group.high.amax(0), -group.low.amin(0))
