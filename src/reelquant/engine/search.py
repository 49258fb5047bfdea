"""Make the choices a recipe leaves open by what they do to whole sampled trajectories.

Local output errors mislead (they undervalue outliers that matter end to end), so every candidate is swapped into the real pipeline,
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

import torch
from torch import Tensor

from reelquant.engine.build import Options
from reelquant.engine.plan import Plan
from reelquant.sites import Group

Assignment = dict[str, Options]  # family -> chosen options


@dataclass(frozen=True)
class Trial:
    """One candidate and its score, kept for the report."""

    family: str
    options: dict[str, Any]
    psnr: float


def candidates(plan: Plan) -> list[Options]:
    """Every combination of the open parameters; one element if the recipe leaves nothing open."""
    per_step = [[(number, options) for options in step.choices()] for number, step in enumerate(plan.recipe.steps)]
    return [{number: options for number, options in combination if options} for combination in itertools.product(*per_step)]


def family(group: Group) -> str:
    """Name of a group with its numbers replaced: blocks of one architecture share families."""
    return re.sub(r"\d+", "*", group.name)


def latent_psnr(reference: Tensor, test: Tensor) -> float:
    """Mean over clips of ``10 log10(peak^2 / mse)`` in dB; the peak is the range of the reference latents. Broken clips count -100."""
    error = (test.float() - reference.float()).square().flatten(1).mean(1)
    peak = reference.float().amax() - reference.float().amin()
    psnr = 10 * torch.log10(peak.square() / error.clamp(min=1e-20))
    return float(torch.nan_to_num(psnr, nan=-100.0, neginf=-100.0).mean())


def choose(
    plan: Plan, groups: Iterable[Group], evaluate: Callable[[Assignment], float], on_trial: Callable[[Trial], None] = lambda trial: None
) -> tuple[Assignment, list[Trial]]:
    """The assignment with the best trajectory.

    Args:
        plan: its recipe holds the choices and the scope.
        groups: all groups with quantized layers.
        evaluate: samples with an assignment and returns the PSNR of its latents in dB.
    """
    options = candidates(plan)
    sizes: dict[str, int] = defaultdict(int)
    for group in groups:
        sizes[family(group)] += sum(plan.layers[name].bytes_before for name in group.layers)
    assignment: Assignment = dict.fromkeys(sizes, options[0])
    trials: list[Trial] = []
    if len(options) == 1:
        return assignment, trials

    def attempt(name: str, trial: Assignment, chosen: Options) -> float:
        trials.append(Trial(name, _readable(plan, chosen), evaluate(trial)))
        on_trial(trials[-1])
        return trials[-1].psnr

    scores = [attempt("all", dict.fromkeys(sizes, one), one) for one in options]
    best = max(scores)
    assignment = {name: options[scores.index(best)] for name in sizes}
    if plan.recipe.search.scope == "family":
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            known = assignment[name]
            for one in options:
                if one != known and (score := attempt(name, assignment | {name: one}, one)) > best:
                    best, assignment = score, assignment | {name: one}
    return assignment, trials


def trial_count(plan: Plan, groups: Iterable[Group]) -> int:
    """How many candidates :func:`choose` will sample (progress)."""
    options, families = len(candidates(plan)), len({family(group) for group in groups})
    if options == 1:
        return 0
    return options + (families * (options - 1) if plan.recipe.search.scope == "family" else 0)


def _readable(plan: Plan, options: Options) -> dict[str, Any]:
    steps = plan.recipe.steps
    return {
        f"{steps[number].transform or steps[number].solve}.{key}": value
        for number, values in options.items()
        for key, value in values.items()
    }
