"""Which parts a denoiser computed at which steps, and where earlier results stood for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from reelquant.discover.components import plain
from reelquant.reuse import CountsCells, Reuse, installed_reuse

Steps = Mapping[int, tuple[int, int]]
"""Number of the step -> how much was computed, and how much was reused."""


def _minus(now: Steps, before: Steps) -> dict[int, tuple[int, int]]:
    """Without what was counted before, and without steps at which nothing is left."""
    pairs = {step: (counts, before.get(step, (0, 0))) for step, counts in now.items()}
    return {step: (a[0] - b[0], a[1] - b[1]) for step, (a, b) in pairs.items() if a != b}


def _plus(one: Steps, other: Steps) -> dict[int, tuple[int, int]]:
    pairs = {step: (one.get(step, (0, 0)), other.get(step, (0, 0))) for step in sorted({*one, *other})}
    return {step: (a[0] + b[0], a[1] + b[1]) for step, (a, b) in pairs.items()}


def _rows(steps: Steps) -> list[list[int]]:
    return [[step, *counts] for step, counts in steps.items()]


def _steps(rows: Iterable[Sequence[int]]) -> dict[int, tuple[int, int]]:
    return {int(step): (int(computed), int(reused)) for step, computed, reused in rows}


@dataclass(frozen=True)
class ReusedSteps:
    """Counts of calls, or of what else a reuse counts.

    Attributes:
        parts: module paths of what may be reused; empty without reuse.
        steps: of all parts together.
        cells: of single parts, where the reuse counts them: part -> the same.
        unit, things: what is counted, and what the parts are; see :class:`reelquant.reuse.Reuse`.
    """

    parts: tuple[str, ...] = ()
    steps: Steps = field(default_factory=dict)
    cells: Mapping[str, Steps] = field(default_factory=dict)
    unit: str = Reuse.unit
    things: str = Reuse.things

    @classmethod
    def of(cls, denoiser: nn.Module) -> ReusedSteps:
        """What a denoiser counted so far."""
        for acting in installed_reuse(plain(denoiser)).values():
            installed = acting.installed
            cells = installed.by_cell() if isinstance(installed, CountsCells) else {}
            return cls(tuple(installed.parts), installed.by_step(), cells, acting.stage.unit, acting.stage.things)
        return cls()

    def since(self, before: ReusedSteps) -> ReusedSteps:
        """Without what was counted before."""
        cells = {part: _minus(steps, before.cells.get(part, {})) for part, steps in self.cells.items()}
        return replace(self, steps=_minus(self.steps, before.steps), cells=cells)

    def plus(self, other: ReusedSteps) -> ReusedSteps:
        """Both together."""
        parts = dict.fromkeys([*self.cells, *other.cells])
        cells = {part: _plus(self.cells.get(part, {}), other.cells.get(part, {})) for part in parts}
        return replace(self if self.parts else other, steps=_plus(self.steps, other.steps), cells=cells)

    def to_json(self) -> dict[str, Any]:
        """As plain data; nothing without reuse."""
        if not self.parts:
            return {}
        words = {"unit": self.unit, "things": self.things} if (self.unit, self.things) != (Reuse.unit, Reuse.things) else {}
        cells = {"cells": {part: _rows(steps) for part, steps in self.cells.items()}} if self.cells else {}
        return {"parts": list(self.parts), "steps": _rows(self.steps)} | cells | words

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ReusedSteps:
        """What :meth:`to_json` gave."""
        cells = {part: _steps(rows) for part, rows in data.get("cells", {}).items()}
        words = data.get("unit", Reuse.unit), data.get("things", Reuse.things)
        return cls(tuple(data.get("parts", ())), _steps(data.get("steps", ())), cells, *words)

    def facts(self) -> dict[str, Any] | None:
        """For reports: the parts, the share of them that was computed, and counts by step; None without reuse."""
        computed, reused = (sum(counts[which] for counts in self.steps.values()) for which in (0, 1))
        return None if not self.parts or not computed + reused else self.to_json() | {"share": computed / (computed + reused)}
