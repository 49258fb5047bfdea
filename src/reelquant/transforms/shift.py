"""Centre every channel, so that a symmetric per-tensor grid wastes no half of itself on skewed channels."""

from __future__ import annotations

from dataclasses import dataclass

from reelquant._errors import RecipeError, nearest
from reelquant.transforms.rewrite import GroupView, Rewrite, Transform

CENTERS = {
    "mid": lambda group: (group.low.amin(0) + group.high.amax(0)) / 2,
    "mean": lambda group: group.mean.mean(0),
}


@dataclass(frozen=True)
class Shift(Transform):
    """Subtract the centre of each channel's range (``mid``) or its mean.

    Paper: QVD (arXiv 2407.11585), scattered channel range integration, step 1; also Outlier Suppression+. Deviations: ranges come from
    all denoising steps (the port: the first one); zero-padded convolutions pad with the shifted zero, so borders stay exact (the port
    ignores them); the bias is corrected for the quantized weight by the engine instead of ``b + W z``.
    """

    center: str = "mid"

    def __post_init__(self) -> None:
        if self.center not in CENTERS:
            raise RecipeError(f"unknown center '{self.center}'; {nearest(self.center, CENTERS)}")

    def plan(self, group: GroupView) -> Rewrite:
        return Rewrite(shift=CENTERS[self.center](group))
