"""Which parts a denoiser computed at which steps, and where earlier results stood for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from reelquant.discover.components import plain
from reelquant.reuse import Reuse, installed_reuse


@dataclass(frozen=True)
class ReusedSteps:
    """Counts of calls, or of what else a reuse counts.

    Attributes:
        parts: module paths of what may be reused; empty without reuse.
        steps: number of the step -> how much of them was computed, and how much was reused.
        unit, things: what is counted, and what the parts are; see :class:`reelquant.reuse.Reuse`.
    """

    parts: tuple[str, ...] = ()
    steps: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    unit: str = Reuse.unit
    things: str = Reuse.things

    @classmethod
    def of(cls, denoiser: nn.Module) -> ReusedSteps:
        """What a denoiser counted so far."""
        for acting in installed_reuse(plain(denoiser)).values():
            return cls(tuple(acting.installed.parts), acting.installed.by_step(), acting.stage.unit, acting.stage.things)
        return cls()

    def since(self, before: ReusedSteps) -> ReusedSteps:
        """Without what was counted before."""
        left = {step: tuple(a - b for a, b in zip(now, before.steps.get(step, (0, 0)), strict=True)) for step, now in self.steps.items()}
        return replace(self, steps={step: (left[step][0], left[step][1]) for step in left if any(left[step])})

    def plus(self, other: ReusedSteps) -> ReusedSteps:
        """Both together."""
        known = [*self.steps, *(step for step in other.steps if step not in self.steps)]
        pairs = {step: (self.steps.get(step, (0, 0)), other.steps.get(step, (0, 0))) for step in sorted(known)}
        return replace(self if self.parts else other, steps={step: (a[0] + b[0], a[1] + b[1]) for step, (a, b) in pairs.items()})

    def to_json(self) -> dict[str, Any]:
        """As plain data; nothing without reuse."""
        if not self.parts:
            return {}
        words = {"unit": self.unit, "things": self.things} if (self.unit, self.things) != (Reuse.unit, Reuse.things) else {}
        return {"parts": list(self.parts), "steps": [[step, *counts] for step, counts in self.steps.items()]} | words

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ReusedSteps:
        """What :meth:`to_json` gave."""
        steps = {int(step): (int(a), int(b)) for step, a, b in data.get("steps", ())}
        return cls(tuple(data.get("parts", ())), steps, data.get("unit", Reuse.unit), data.get("things", Reuse.things))

    def facts(self) -> dict[str, Any] | None:
        """For reports: the parts, the share of them that was computed, and counts by step; None without reuse."""
        computed, reused = (sum(counts[which] for counts in self.steps.values()) for which in (0, 1))
        return None if not self.parts or not computed + reused else self.to_json() | {"share": computed / (computed + reused)}
