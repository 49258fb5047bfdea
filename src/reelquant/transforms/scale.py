"""Move difficulty from activations to weights channel by channel (smoothing)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reelquant._errors import RecipeError, nearest
from reelquant.stages import GroupView, Rewrite, StageSite, magnitude
from reelquant.transforms.rotate import Rotate
from reelquant.transforms.transform import Transform


def _by_step(group: GroupView) -> Tensor:
    low, high = group.by_step()
    return torch.maximum(high, -low)


def _weighted(group: GroupView) -> Tensor:
    """Mean of the steps' largest magnitudes, each step weighted by the range of all its channels together."""
    low, high = group.by_step()
    reach = high.amax(1) - low.amin(1)
    return (torch.maximum(high, -low) * (reach / reach.sum().clamp_min(1e-30))[:, None]).sum(0)


PEAKS: dict[str, Callable[[GroupView], Tensor]] = {
    "all": magnitude,
    "first": lambda group: _by_step(group)[0],
    "mean": lambda group: _by_step(group).mean(0),
    "weighted": _weighted,
}
"""Largest magnitude of every channel ``[channels]``: over all steps, at the first one, or the mean of the steps', plain or weighted."""


@dataclass(frozen=True)
class Scale(Transform):
    """Divide each channel by ``max|x|^alpha / max|W|^(1 - alpha)``, normalised to a geometric mean of 1.

    Attributes:
        alpha: how much of the difference between channels moves.
        peak: the steps that ``max|x|`` is of: ``all``, the ``first``, or the ``mean`` of the largest magnitudes of each step; ``weighted``:
            a mean to which steps with a wide range of activations count more.

    Papers: SmoothQuant (arXiv 2211.10438), equation 4; TCAQ-DM (arXiv 2412.16700) for ``weighted``, where the weight of a step is a
    reconstruction of ours: its range over the sum of those of all steps. The weights of all layers that share the input count together.
    """

    alpha: float = 0.5
    peak: str = "all"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha lies in [0, 1], got {self.alpha}")
        if self.peak not in PEAKS:
            raise RecipeError(f"unknown peak '{self.peak}'; {nearest(self.peak, PEAKS)}")

    def supports(self, site: StageSite) -> str | None:
        places = [place for place, stage in enumerate(site.before) if isinstance(stage, Rotate)]
        unseen = any(not site.before[place].observed(replace(site, before=site.before[:place])) for place in places)
        if self.peak != "all" and unseen:
            return f"peak: {self.peak} needs ranges of single steps, which are not known after that rotation; put this step before it"
        return None

    def plan(self, group: GroupView) -> Rewrite:
        inputs = PEAKS[self.peak](group).clamp(min=1e-5)
        return Rewrite(scale=normalised(inputs**self.alpha / largest_weights(group) ** (1 - self.alpha)))


def largest_weights(group: GroupView) -> Tensor:
    """Largest magnitude of every channel's weights, of all layers that read the input: ``[channels]``."""
    columns = [weight.movedim(1, 0).flatten(1).abs().amax(1) for weight in group.weights]
    return torch.stack(columns).amax(0).clamp(min=1e-5)


def normalised(scale: Tensor) -> Tensor:
    """With a geometric mean of 1."""
    return scale / scale.log().mean().exp()
