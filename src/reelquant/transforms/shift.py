"""Centre every channel, so that a symmetric per-tensor grid wastes no half of itself on skewed channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reelquant._errors import RecipeError, nearest
from reelquant.stages import GroupView, Rewrite, magnitude
from reelquant.transforms.transform import Transform

CENTERS = {
    "mid": lambda group: (group.low.amin(0) + group.high.amax(0)) / 2,
    "mean": lambda group: group.mean.mean(0),
}


@dataclass(frozen=True)
class Shift(Transform):
    """Subtract the centre of each channel's range (``mid``) or its mean.

    Attributes:
        center: ``mid`` or ``mean``.
        least: groups whose channels would get narrower by less than this share, on average, are left alone: no vector to store.

    Paper: QVD (arXiv 2407.11585), scattered channel range integration, step 1; also Outlier Suppression+. Deviations: ranges come from
    all denoising steps (the port: the first one); zero-padded convolutions pad with the shifted zero, so borders stay exact (the port
    ignores them); the bias is corrected for the quantized weight by the engine instead of ``b + W z``.
    """

    center: str = "mid"
    least: float = 0.0

    def __post_init__(self) -> None:
        if self.center not in CENTERS:
            raise RecipeError(f"unknown center '{self.center}'; {nearest(self.center, CENTERS)}")

    def plan(self, group: GroupView) -> Rewrite:
        shift = CENTERS[self.center](group)
        before = magnitude(group)
        after = torch.maximum(group.high.amax(0) - shift, shift - group.low.amin(0))
        gain = 1 - (after / before.clamp(min=torch.finfo(before.dtype).tiny)).mean()
        return Rewrite(shift=shift) if group.rounded and float(gain) >= self.least else Rewrite()
