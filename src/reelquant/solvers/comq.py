"""Coordinate descent: column after column takes the codes that are best while all other columns stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reelquant._errors import RecipeError, nearest
from reelquant.formats import Quantizer
from reelquant.solvers.gptq import PER_MOMENT, Gptq
from reelquant.solvers.nearest import Nearest
from reelquant.solvers.problem import Problem
from reelquant.solvers.solver import Solver, columns_problem
from reelquant.stages import Solution, StageSite

STARTS: dict[str, Solver] = {"nearest": Nearest(), "gptq": Gptq()}
"""Solvers that descent may start from, with their own default parameters."""
BLOCK = 64
"""Columns whose changes are applied to the columns outside of them at once."""


@dataclass(frozen=True)
class Comq(Solver):
    """Coordinate descent on the second moments of the input, without gradients or a factorization.

    With the error ``E`` of all weights and the covariance ``C``, the best value of column ``i`` is ``q_i - (E C)_i / C_ii``: the
    objective is a parabola in each weight, so the level nearest to that value is the best one. No change raises the objective.

    Attributes:
        start: the solver whose codes are improved, ``nearest`` or ``gptq``.
        passes: over all columns, at most; the work ends when a pass changes nothing.

    Paper: COMQ (arXiv 2403.07134). Deviations: scales stay those of the range rule (solver ``als`` changes them); the covariance is
    centred, because a corrected bias absorbs the mean; columns are visited in the order of their input variance alone (theirs: times
    the size of the weights); the start may be gptq.
    """

    start: str = "gptq"
    passes: int = 4
    statistics: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        check_descent("comq", self.start, self.passes)

    def supports(self, site: StageSite) -> str | None:
        return columns_problem("comq", site)

    def peak_bytes(self, rows: int, width: int) -> int:
        return PER_MOMENT * width**2

    def solve(self, problem: Problem) -> Solution:
        start = STARTS[self.start].checked(problem)
        values = start.values
        for _ in range(self.passes):
            before, values = values, descend(problem, start.quantizer, values)
            if torch.equal(before, values):
                break
        found = Solution(start.quantizer, start.quantizer.codes(values))
        # Sums of float32 round: near the minimum a pass may lose as much as it wins.
        return found if problem.objective(found.values) <= problem.objective(start.values) else start


def check_descent(name: str, start: str, passes: int) -> None:
    """Refuse a start that is no solver, and less than one pass.

    Raises:
        RecipeError: naming the value and what would work.
    """
    if start not in STARTS:
        raise RecipeError(f"unknown start '{start}' of {name}; {nearest(start, STARTS)}")
    if passes < 1:
        raise RecipeError(f"passes of {name} is at least 1, got {passes}")


def descend(problem: Problem, quantizer: Quantizer, values: Tensor) -> Tensor:
    """One pass over all columns, those of the largest input variance first: the new values ``[out, in]``.

    Args:
        values: levels of the quantizer, ``[out, in]``.
    """
    covariance = problem.covariance
    assert covariance is not None, "the engine provides what 'statistics' names"
    order = covariance.diagonal().argsort(descending=True, stable=True)
    moments, places = covariance[order][:, order], order.tolist()
    slopes = (values - problem.weight)[:, order] @ moments
    values = values.clone()
    for first in range(0, len(places), BLOCK):
        inside = slice(first, min(first + BLOCK, len(places)))
        changes = _descend_block(quantizer, values, places[inside], slopes[:, inside], moments[inside, inside])
        slopes[:, inside.stop :] += changes @ moments[inside, inside.stop :]
    return values


def _descend_block(quantizer: Quantizer, values: Tensor, places: list[int], slopes: Tensor, moments: Tensor) -> Tensor:
    """Improve some columns in place, and give what was added to each, ``[out, columns]``; later columns get the new slopes at once."""
    changes = torch.zeros_like(slopes)
    for number, (place, variance) in enumerate(zip(places, moments.diagonal().tolist(), strict=True)):
        if variance <= 0:
            continue  # an input that never changes: every code is as good
        old = values[:, place : place + 1]
        best = old - slopes[:, number : number + 1] / variance
        new = quantizer.round_columns(best, place)
        new = torch.where((new - best).abs() < (old - best).abs(), new, old)
        changes[:, number : number + 1] = new - old
        slopes[:, number:] += (new - old) * moments[number, number:]
        values[:, place : place + 1] = new
    return changes
