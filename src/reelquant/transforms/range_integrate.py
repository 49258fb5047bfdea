"""Bring the scattered ranges of channels to a common one."""

from __future__ import annotations

from dataclasses import dataclass

from reelquant._errors import RecipeError
from reelquant.stages import GroupView, Rewrite, magnitude
from reelquant.transforms.transform import Transform


@dataclass(frozen=True)
class RangeIntegrate(Transform):
    """Divide each channel by ``(range / largest range) ** power``: 0 leaves it alone, 1 lets every channel fill the whole grid.

    ``cap`` in (0, 1] is the published rule instead: only channels beyond ``cap * largest range`` shrink to it, none grows.

    Paper: QVD (arXiv 2407.11585), scattered channel range integration, step 2. Deviations: theirs searches ``cap`` against the local
    output error; ours searches ``power`` (and may search ``cap``) against the end of a whole sampled trajectory, because the local
    error misjudges outliers that matter end to end.
    """

    power: float = 1.0
    cap: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 1:
            raise RecipeError(f"power lies in [0, 1], got {self.power}")
        if self.cap is not None and not 0 < self.cap <= 1:
            raise RecipeError(f"cap lies in (0, 1], got {self.cap}")

    def plan(self, group: GroupView) -> Rewrite:
        if not group.rounded or (self.cap is None and self.power == 0):
            return Rewrite()
        size = magnitude(group)
        relative = (size / size.amax().clamp(min=1e-30)).clamp(min=1e-4)  # a dead channel must not turn into a huge weight ratio
        scale = (relative / self.cap).clamp(min=1) if self.cap is not None else relative**self.power
        return Rewrite(scale=scale)
