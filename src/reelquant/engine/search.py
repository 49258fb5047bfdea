"""Make the choices a recipe leaves open by what they do to whole sampled trajectories.

Local output errors mislead (they undervalue outliers that matter end to end), so every candidate is put into the real pipeline,
sampled with few steps, and judged by its distance to the float latents. Scope ``model`` tries each candidate for all layers at once;
``family`` then revisits the layers that share a name up to block numbers, widest first.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
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
    plan: Plan,
    groups: Iterable[Group],
    evaluate: Callable[[Sequence[Assignment]], Sequence[float]],
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> tuple[Assignment, list[Trial]]:
    """The assignment with the best trajectory.

    Args:
        plan: its recipe holds the choices and the scope.
        groups: all groups with quantized layers.
        evaluate: samples with each of several assignments and returns the PSNRs of their latents in dB.
    """
    choices = candidates(plan)
    sizes: dict[str, int] = defaultdict(int)
    for group in groups:
        sizes[family(group)] += sum(plan.layers[name].bytes_before for name in group.layers)
    assignment: Assignment = dict.fromkeys(sizes, choices[0])
    trials: list[Trial] = []
    if len(choices) == 1:
        return assignment, trials

    def attempt(name: str, tried: Sequence[Choice], assignments: Sequence[Assignment]) -> list[float]:
        scores = list(evaluate(assignments))
        for one, score in zip(tried, scores, strict=True):
            trials.append(Trial(name, one.named(plan.entries), score))
            on_trial(trials[-1])
        return scores

    scores = attempt("all", choices, [dict.fromkeys(sizes, one) for one in choices])
    best = max(scores)
    assignment = {name: choices[scores.index(best)] for name in sizes}
    if plan.recipe.search.scope == "family":
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            others = [one for one in choices if one != assignment[name]]
            attempts = [assignment | {name: one} for one in others]
            for other, score in zip(attempts, attempt(name, others, attempts), strict=True):
                if score > best:
                    best, assignment = score, other
    return assignment, trials


def trial_count(plan: Plan, groups: Iterable[Group]) -> int:
    """How many candidates :func:`choose` will sample (progress)."""
    options, families = len(candidates(plan)), len({family(group) for group in groups})
    if options == 1:
        return 0
    return options + (families * (options - 1) if plan.recipe.search.scope == "family" else 0)
