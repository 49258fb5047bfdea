"""Make the choices a recipe leaves open by what they do to whole sampled trajectories.

Local output errors mislead (they undervalue outliers that matter end to end), so every candidate is put into the real pipeline,
sampled with few steps, and judged by its distance to the float latents. Scope ``model`` tries each candidate for all layers at once;
``family`` then revisits the layers that share a name up to block numbers, widest first.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from reelquant.engine.choice import Choice
from reelquant.engine.plan import Plan
from reelquant.sites import Group

Assignment = dict[str, Choice]  # family -> what was chosen for it


@dataclass(frozen=True)
class Trial:
    """One candidate and its score, kept for the report."""

    family: str
    options: dict[str, Any]
    psnr: float


def candidates(plan: Plan) -> list[Choice]:
    """Every combination of the open parameters; one element if the recipe leaves nothing open."""
    per_entry = [range(len(entry.alternatives)) for entry in plan.entries]
    return [Choice(picks) for picks in itertools.product(*per_entry)]


def family(group: Group) -> str:
    """Name of a group with its numbers replaced: blocks of one architecture share families."""
    return re.sub(r"\d+", "*", group.name)


def choose(
    plan: Plan, groups: Iterable[Group], evaluate: Callable[[Assignment], float], on_trial: Callable[[Trial], None] = lambda trial: None
) -> tuple[Assignment, list[Trial]]:
    """The assignment with the best trajectory.

    Args:
        plan: its recipe holds the choices and the scope.
        groups: all groups with quantized layers.
        evaluate: samples with an assignment and returns the PSNR of its latents in dB.
    """
    choices = candidates(plan)
    sizes: dict[str, int] = defaultdict(int)
    for group in groups:
        sizes[family(group)] += sum(plan.layers[name].bytes_before for name in group.layers)
    assignment: Assignment = dict.fromkeys(sizes, choices[0])
    trials: list[Trial] = []
    if len(choices) == 1:
        return assignment, trials

    def attempt(name: str, trial: Assignment, chosen: Choice) -> float:
        trials.append(Trial(name, chosen.named(plan.entries), evaluate(trial)))
        on_trial(trials[-1])
        return trials[-1].psnr

    scores = [attempt("all", dict.fromkeys(sizes, one), one) for one in choices]
    best = max(scores)
    assignment = {name: choices[scores.index(best)] for name in sizes}
    if plan.recipe.search.scope == "family":
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            known = assignment[name]
            for one in choices:
                if one != known and (score := attempt(name, assignment | {name: one}, one)) > best:
                    best, assignment = score, assignment | {name: one}
    return assignment, trials


def trial_count(plan: Plan, groups: Iterable[Group]) -> int:
    """How many candidates :func:`choose` will sample (progress)."""
    options, families = len(candidates(plan)), len({family(group) for group in groups})
    if options == 1:
        return 0
    return options + (families * (options - 1) if plan.recipe.search.scope == "family" else 0)
