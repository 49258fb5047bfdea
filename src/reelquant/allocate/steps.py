"""A budget of bits over the denoising steps: every step gets a number of bits for all inputs, or for all weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reelquant._errors import RecipeError, nearest
from reelquant.allocate.greedy import greedy
from reelquant.allocate.milp import solve
from reelquant.allocate.problem import Picks, Problem
from reelquant.allocate.table import EVERY, MEASURES, Measure, Part, SensitivityTable

TAKEN: dict[Measure, int] = {"gradient": 1, "noise": 1}  # bits below the budget that a step may get, by what holds for small errors only
KEYS: dict[Part, str] = {"input": "inputs", "weight": "weights"}  # of ``step_bits`` in recipes
STARTS: dict[str, Callable[[Problem], Picks]] = {
    "milp": lambda problem: solve(problem.damage, problem.sizes, problem.budget),
    "greedy": greedy,
}
"""Method -> where :func:`descend` begins: the best choice if the damages of steps only add up, or one that is climbed to."""


@dataclass(frozen=True)
class StepPlan:
    """Bits by step.

    Attributes:
        component: the denoiser.
        part: what has them, all inputs or all weights.
        bits: of each step of the denoiser.
        damage: predicted.
        uniform: the most bits for all steps within the budget, and what they are predicted to do.
    """

    component: str
    part: Part
    bits: tuple[int, ...]
    damage: float
    uniform: tuple[int, float]

    @property
    def mean(self) -> float:
        """Bits, mean over the steps."""
        return sum(self.bits) / len(self.bits)

    def overrides(self, table: SensitivityTable) -> dict[str, Any]:
        """The keys of a recipe that say the same.

        Recipes count steps through the whole sampler, of which each of two experts makes its own part. Steps of the other one get the
        uniform bits; its own recipe says what it gets.
        """
        own = dict(zip(table.timesteps[self.component], self.bits, strict=True))
        several = len(table.timesteps) > 1
        whole = sorted({one for times in table.timesteps.values() for one in times}, reverse=True) if several else [*own]
        return {f"step_bits.{KEYS[self.part]}": [own.get(time, self.uniform[0]) for time in whole]}


def allocate_steps(
    table: SensitivityTable,
    bits: float,
    component: str | None = None,
    measure: Measure | None = None,
    *,
    part: Part = "input",
    method: str = "milp",
) -> StepPlan:
    """Divide a budget of bits among the steps of a denoiser.

    Rounding at one step moves the final latents by an error; errors of several steps add up as vectors. Their squares are the damages of
    single steps, and :attr:`SensitivityTable.together` holds the cosines between them: near 1 between neighbouring steps for weights,
    whose rounding error is the same at all steps, and small for inputs. Errors of different bits are taken to be independent. The plan
    begins at the best one by damages alone, and steps exchange bits as long as the predicted square of the sum becomes less.

    Damages count with the upper end of their interval: where few bits change what a clip shows, they do it in one clip of many. Between
    numbers of bits that were measured the logarithm of the damage is interpolated. Damages by gradients or noise hold for small errors,
    so plans made of them take one bit at most from a step.

    Args:
        table: with damages of all inputs, or of all weights, at single steps.
        bits: most bits, mean over the steps.
        component: the denoiser; the only one if none is named.
        measure: which damages count; by default the most trusted ones that the table has of single steps.
        part: ``input`` or ``weight``.
        method: ``milp`` begins at the optimum of the sum of damages (HiGHS), ``greedy`` where bits are given one by one.

    Raises:
        RecipeError: if the table has no such damages, or the budget is out of reach.
    """
    if method not in STARTS:
        raise RecipeError(f"unknown method '{method}' of a plan over steps; {nearest(method, STARTS)}")
    name = component or table.components[0]
    table.of(name)
    chosen, damages = _by_step(table, name, measure, part)
    choices = [one for one in sorted(damages) if one >= int(bits) - TAKEN.get(chosen, one)]
    if len(choices) < 2 or choices[0] > bits:
        raise RecipeError(
            f"{bits} bits a step are out of reach: {KEYS[part]} were measured at single steps with {', '.join(map(str, choices)) or 'no'} "
            "bits; a plan chooses among two numbers or more, one of them within the budget"
        )
    damage, steps = np.array([damages[one] for one in choices]), len(table.timesteps[name])  # [choices, steps]
    cosines = table.together.get((name, part, chosen), np.eye(steps))
    grams = np.asarray(cosines) * np.sqrt(damage[:, :, None] * damage[:, None])
    problem = Problem(damage.T, np.tile(np.array(choices, dtype=float), (steps, 1)), bits * steps)
    flat = max(number for number, one in enumerate(choices) if one <= bits)
    starts = [[flat] * steps, STARTS[method](problem)]
    picks = min((descend(grams, problem, start) for start in starts), key=lambda one: together(grams, one))
    plan = tuple(choices[pick] for pick in picks)
    return StepPlan(name, part, plan, together(grams, picks), (choices[flat], together(grams, [flat] * steps)))


def together(grams: np.ndarray, picks: Sequence[int]) -> float:
    """Predicted damage of picks.

    Args:
        grams: ``[choices, steps, steps]``, products of the errors of two steps with the same choice.
        picks: the number of a choice for every step.
    """
    chosen = np.arange(len(grams))[:, None] == np.asarray(picks)
    return float(np.einsum("cs,cst,ct->", chosen, grams, chosen))


def descend(grams: np.ndarray, problem: Problem, start: Sequence[int]) -> Picks:
    """The picks after all changes by one choice, of a step or of two, that do less damage and stay within the budget, the best first."""
    picks, now = list(start), together(grams, start)
    while True:
        fitting = [one for one in _neighbours(picks, problem.formats) if problem.fits(one)]
        best = min(fitting, key=lambda one: together(grams, one), default=picks)
        if (found := together(grams, best)) >= now * (1 - 1e-9):
            return picks
        picks, now = best, found


def _neighbours(picks: Picks, choices: int) -> list[Picks]:
    """Picks with one step a choice up or down, and with two steps changed so."""
    moves = [(step, pick) for step, now in enumerate(picks) for pick in (now - 1, now + 1) if 0 <= pick < choices]
    pairs = [(one, other) for number, one in enumerate(moves) for other in moves[number + 1 :] if one[0] != other[0]]
    return [_with(picks, *changes) for changes in [*((move,) for move in moves), *pairs]]


def _with(picks: Picks, *changes: tuple[int, int]) -> Picks:
    made = list(picks)
    for step, pick in changes:
        made[step] = pick
    return made


def bits_of(written: str) -> int:
    """Bits of a format like ``int6/token``; 0 if it is no integer, which alone can have other bits at some steps."""
    found = re.fullmatch(r"u?int(\d)/.*", written)
    return int(found[1]) if found else 0


def _by_step(table: SensitivityTable, component: str, measure: Measure | None, part: Part) -> tuple[Measure, Mapping[int, list[float]]]:
    """How damages at single steps were measured, and bits -> damage of every step. Of several granularities, that with most bits."""
    steps = len(table.timesteps[component])
    rows = [
        row
        for row in table.rows
        if (row.component, row.layer, row.part) == (component, EVERY, part) and row.steps is not None and row.steps[0] == row.steps[1]
    ]
    measures = [one for one in MEASURES if any(row.measure == one for row in rows)]
    chosen = measure or next(iter(measures), None)
    if chosen is None or chosen not in measures:
        raise RecipeError(
            f"the table of '{table.model}' holds no damages of {KEYS[part]} at single steps"
            + (f" by '{measure}'; it has them by {', '.join(measures) or 'nothing'}" if measure else f"; measure with {KEYS[part]}")
        )
    found: dict[str, dict[int, dict[int, float]]] = {}
    for row in rows:
        if row.measure == chosen and row.steps is not None and (bits := bits_of(row.format)):
            found.setdefault(row.format.partition("/")[2], {}).setdefault(bits, {})[row.steps[0]] = max(row.high, row.damage)
    complete = [
        {bits: [one[step] for step in range(steps)] for bits, one in by_bits.items() if len(one) == steps} for by_bits in found.values()
    ]
    return chosen, _between(max(complete, key=len, default={}))


def _between(measured: Mapping[int, list[float]]) -> Mapping[int, list[float]]:
    """The same with all numbers of bits from the fewest to the most: the logarithm of a damage falls evenly in between."""
    known = sorted(measured)
    logs = np.log(np.maximum(np.array([measured[one] for one in known]), 1e-300))  # [bits, steps]
    every = range(known[0], known[-1] + 1) if known else ()
    return {bits: [float(np.exp(np.interp(bits, known, step))) for step in logs.T] for bits in every}
