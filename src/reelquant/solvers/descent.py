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
from reelquant.solvers.solver import Solver, columns_problem, name_of
from reelquant.stages import StageSite

STARTS: dict[str, Solver] = {"nearest": Nearest(), "gptq": Gptq()}
"""Solvers that others may start from, with their own default parameters."""
BLOCK = 64
"""Columns whose changes are applied to the columns outside of them at once."""


@dataclass(frozen=True)
class Descent(Solver):
    """What solvers that descend from another solver's codes share.

    Attributes:
        start: the solver whose result is improved, ``nearest`` or ``gptq``.
        passes: over all columns, at most.
    """

    start: str = "gptq"
    passes: int = 4
    statistics: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise RecipeError(f"unknown start '{self.start}' of {name_of(type(self))}; {nearest(self.start, STARTS)}")
        if self.passes < 1:
            raise RecipeError(f"passes of {name_of(type(self))} is at least 1, got {self.passes}")

    def supports(self, site: StageSite) -> str | None:
        return columns_problem(name_of(type(self)), site)

    def peak_bytes(self, rows: int, width: int) -> int:
        return PER_MOMENT * width**2


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
