"""Move difficulty from activations to weights channel by channel (smoothing)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reelquant._errors import RecipeError
from reelquant.stages import GroupView, Rewrite, magnitude
from reelquant.transforms.transform import Transform


@dataclass(frozen=True)
class Scale(Transform):
    """Divide each channel by ``max|x|^alpha / max|W|^(1 - alpha)``, normalised to a geometric mean of 1.

    Paper: SmoothQuant (arXiv 2211.10438), equation 4. The weights of all layers that share the input count together.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha lies in [0, 1], got {self.alpha}")

    def plan(self, group: GroupView) -> Rewrite:
        columns = [weight.movedim(1, 0).flatten(1).abs().amax(1) for weight in group.weights]
        weight = torch.stack(columns).amax(0).clamp(min=1e-5)
        scale = magnitude(group).clamp(min=1e-5) ** self.alpha / weight ** (1 - self.alpha)
        return Rewrite(scale=scale / scale.log().mean().exp())
