"""A budget of input bits over the denoising steps: one number of bits everywhere, and eight at the steps that gain most."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reelquant._errors import RecipeError
from reelquant.allocate.table import EVERY, Measure, SensitivityTable

FINE = 8  # bits at protected steps: what layers can widen their stored scales to


@dataclass(frozen=True)
class StepPlan:
    """Bits of inputs by step. Layers store one number of bits, and widen it to eight at protected steps (`protect_steps`).

    Attributes:
        component: the denoiser.
        format: of inputs at the other steps.
        fine: the format with eight bits.
        protected: steps with eight bits, in order.
        bits: mean over the steps.
        damage: predicted, the sum over steps.
        uniform: the most precise format for all steps within the budget, and what it is predicted to do.
    """

    component: str
    format: str
    fine: str
    protected: tuple[int, ...]
    bits: float
    damage: float
    uniform: tuple[str, float]

    def overrides(self, table: SensitivityTable) -> dict[str, Any]:
        """The keys of a recipe that say the same; the granularity of inputs stays the recipe's own.

        Recipes count steps through the whole sampler, of which each of two experts makes its own part.
        """
        changed: dict[str, Any] = {"defaults.input.format": self.format.partition("/")[0]}
        own = table.timesteps[self.component]
        whole = own if len(table.timesteps) == 1 else sorted({one for times in table.timesteps.values() for one in times}, reverse=True)
        if self.protected:
            changed["protect_steps"] = {"steps": [list(whole).index(own[step]) for step in self.protected], "inputs": "8-bit"}
        return changed


def bits_of(written: str) -> int:
    """Bits of an input's format like ``int6/token``.

    Raises:
        RecipeError: if it is no integer: only integers are widened at protected steps.
    """
    found = re.fullmatch(r"u?int(\d)/.*", written)
    if found is None:
        raise RecipeError(f"a budget over steps is of integer inputs, got '{written}'")
    return int(found[1])


def allocate_steps(table: SensitivityTable, bits: float, component: str | None = None, measure: Measure | None = None) -> StepPlan:
    """Divide a budget of input bits among the steps of a denoiser.

    For every number of bits below eight that the table was measured with, as many steps as the budget allows get eight bits: those where
    that saves most. The best of these plans is taken, or one number of bits for all steps if that is predicted to be better.

    Args:
        table: with damages of all inputs at single steps.
        bits: most bits of an input, mean over the steps.
        component: the denoiser; the only one if none is named.
        measure: which damages count; by default the most trusted ones that the table has of single steps.

    Raises:
        RecipeError: if the table has no such damages, or the budget is out of reach.
    """
    name = component or table.components[0]
    table.of(name)
    damages = _by_step(table, name, measure)
    steps = len(table.timesteps[name])
    fine = next((fmt for fmt in damages if bits_of(fmt) == FINE), None)
    if fine is None:
        raise RecipeError(f"the table of '{table.model}' has no inputs of {FINE} bits, which protected steps get; measure them, too")
    plans = [_plan(damages, fmt, fine, steps, bits) for fmt in damages if bits_of(fmt) <= bits]
    if not plans:
        least = min(map(bits_of, damages))
        raise RecipeError(f"{bits} bits a step are out of reach: inputs were measured with {least} bits and more")
    uniform = max((fmt for fmt in damages if bits_of(fmt) <= bits), key=bits_of)
    fmt, protected, damage = min([*plans, (uniform, (), sum(damages[uniform].values()))], key=lambda plan: plan[2])
    mean = bits_of(fmt) + (FINE - bits_of(fmt)) * len(protected) / steps
    return StepPlan(name, fmt, fine, protected, mean, damage, (uniform, sum(damages[uniform].values())))


def _plan(damages: Mapping[str, Mapping[int, float]], fmt: str, fine: str, steps: int, bits: float) -> tuple[str, tuple[int, ...], float]:
    coarse, finer = damages[fmt], damages[fine]
    count = 0 if bits_of(fmt) == FINE else min(int((bits - bits_of(fmt)) * steps / (FINE - bits_of(fmt)) + 1e-9), steps)
    order = sorted(range(steps), key=lambda step: (finer[step] - coarse[step], step))
    protected = tuple(sorted(step for step in order[:count] if finer[step] < coarse[step]))
    return fmt, protected, sum(finer[step] if step in protected else coarse[step] for step in range(steps))


def _by_step(table: SensitivityTable, component: str, measure: Measure | None) -> dict[str, dict[int, float]]:
    """Format -> step -> damage of all inputs at that step alone."""
    rows = [row for row in table.rows if row.component == component and row.layer == EVERY and row.part == "input" and row.steps]
    measures = [one for one in table.measures if any(row.measure == one for row in rows)]
    chosen = measure or next(iter(measures), None)
    if chosen not in measures:
        raise RecipeError(
            f"the table of '{table.model}' holds no damages of inputs at single steps"
            + (f" by '{measure}'; it has them by {', '.join(measures) or 'nothing'}" if measure else "; measure with inputs")
        )
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.measure == chosen and row.steps is not None and row.steps[0] == row.steps[1]:
            found.setdefault(row.format, {})[row.steps[0]] = row.damage
    return {fmt: one for fmt, one in found.items() if len(one) == len(table.timesteps[component])}
