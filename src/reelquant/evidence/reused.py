"""Which blocks a denoiser computed at which steps, and where earlier results stood for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from reelquant.discover.components import plain
from reelquant.reuse import installed_reuse


@dataclass(frozen=True)
class ReusedSteps:
    """Counts of calls.

    Attributes:
        parts: module paths of the blocks that may be reused; empty without reuse.
        steps: number of the step -> calls in which they were computed, calls in which they were reused.
    """

    parts: tuple[str, ...] = ()
    steps: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, denoiser: nn.Module) -> ReusedSteps:
        """What a denoiser counted so far."""
        for acting in installed_reuse(plain(denoiser)).values():
            return cls(tuple(acting.installed.parts), acting.installed.by_step())
        return cls()

    def since(self, before: ReusedSteps) -> ReusedSteps:
        """Without what was counted before."""
        left = {step: tuple(a - b for a, b in zip(now, before.steps.get(step, (0, 0)), strict=True)) for step, now in self.steps.items()}
        return ReusedSteps(self.parts, {step: (left[step][0], left[step][1]) for step in left if any(left[step])})

    def plus(self, other: ReusedSteps) -> ReusedSteps:
        """Both together."""
        known = [*self.steps, *(step for step in other.steps if step not in self.steps)]
        pairs = {step: (self.steps.get(step, (0, 0)), other.steps.get(step, (0, 0))) for step in sorted(known)}
        return ReusedSteps(self.parts or other.parts, {step: (a[0] + b[0], a[1] + b[1]) for step, (a, b) in pairs.items()})

    def to_json(self) -> dict[str, Any]:
        """As plain data; nothing without reuse."""
        return {} if not self.parts else {"parts": list(self.parts), "steps": [[step, *counts] for step, counts in self.steps.items()]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ReusedSteps:
        """What :meth:`to_json` gave."""
        return cls(tuple(data.get("parts", ())), {int(step): (int(a), int(b)) for step, a, b in data.get("steps", ())})

    def facts(self) -> dict[str, Any] | None:
        """For reports: the blocks, the share of their calls that was computed, and counts by step; None without reuse."""
        computed, reused = (sum(counts[which] for counts in self.steps.values()) for which in (0, 1))
        return None if not self.parts or not computed + reused else self.to_json() | {"share": computed / (computed + reused)}
