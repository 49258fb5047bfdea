"""How often stages call the denoiser beside calibration, search and check, before anything is done."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from reelquant.engine.calibration import Expected, recorded_calls
from reelquant.engine.plan import Plan
from reelquant.recipes.entry import Entry
from reelquant.recipes.recipe import Recipe

GUIDED = 2  # denoiser calls per step: samplers with guidance make two


@dataclass(frozen=True)
class StageCalls:
    """Denoiser calls of one stage, at most.

    Attributes:
        name: what the recipe calls it.
        sampled: to sample held-out texts, and those of calibration where the stage wants calls of the quantized pipeline.
        replayed: recorded calls that are made again for the parts it works on, in float and behind quantized parts.
        own: what it computes itself, in calls.
    """

    name: str
    sampled: int
    replayed: int
    own: int

    @classmethod
    def of(cls, plan: Plan, entry: Entry, expected: Expected) -> StageCalls:
        """Those of a stage if calibration samples as much as expected."""
        stage = entry.stage
        held_out = stage.held_out_runs(expected.steps) * expected.steps * held_out_batches(plan.recipe)
        sampled = held_out + resampled_steps(plan, entry, expected)
        wanted = stage.records if stage.resamples else recorded_calls(plan)
        recorded = min(2 * wanted, expected.calls * GUIDED)  # up to twice as many as wanted are kept
        parts = len(plan.parts(entry)) if entry.acts("solve_block") else 0
        return cls(f"{entry.axis} {entry.name}", sampled * GUIDED, 2 * recorded * parts, stage.own_calls(len(plan.touched(entry))))

    @property
    def whole(self) -> int:
        """Calls of the denoiser where it is."""
        return self.sampled + self.replayed


def resampled_steps(plan: Plan, entry: Entry, expected: Expected) -> int:
    """Denoising steps of the second observation of a stage; 0 if it has none."""
    wanted = plan.recipe.calibrate
    return expected.steps * math.ceil(wanted.prompts / wanted.batch) if entry.stage.resamples and wanted else 0


def held_out_batches(recipe: Recipe) -> int:
    """Runs of the sampler for the held-out texts."""
    return math.ceil(recipe.search.prompts / 4)


def by_name(stages: Sequence[StageCalls]) -> Counter[str]:
    """Calls by the name of the stage; stages without calls are left out."""
    return sum((Counter({stage.name: stage.whole + stage.own}) for stage in stages), Counter[str]())
