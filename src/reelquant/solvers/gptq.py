"""Round column by column and let the columns to the right make up for each error."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reelquant._errors import RecipeError
from reelquant.formats import Quantizer, fit
from reelquant.observe import inverse_factor
from reelquant.solvers.problem import Problem
from reelquant.solvers.solver import Solver, columns_problem
from reelquant.stages import Solution, StageSite

PER_MOMENT = 48
"""Bytes per element of the second moment at the peak: the moments, their covariance and a factorization in double precision.
An assumption, not measured."""


@dataclass(frozen=True)
class Gptq(Solver):
    """GPTQ with static scales.

    Attributes:
        damping: share of each input's own variance that is added to the diagonal of the covariance.
        block: columns whose updates are applied together.
        ordered: round the columns of the largest input variance first, while many others are left to make up for them.

    Paper: GPTQ (arXiv 2210.17323), algorithm 1, and the order of its reference code's ``act_order``. Deviations: the matrix is the
    *centred* covariance of the input, because a corrected bias absorbs the mean; damping is relative to each input's variance (theirs:
    to the mean of all), so that one factorization serves all rescalings of the channels; group scales are those of the untouched weight
    ("static groups"), so scales and codes stay consistent and columns keep their place in storage whatever the order.
    """

    damping: float = 0.01
    block: int = 64
    ordered: bool = True
    statistics: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        if not 0 < self.damping < 1:
            raise RecipeError(f"damping lies in (0, 1), got {self.damping}")
        if self.block < 1:
            raise RecipeError(f"block counts columns that are solved together, 1 or more, got {self.block}")

    def supports(self, site: StageSite) -> str | None:
        return columns_problem("gptq", site)

    def peak_bytes(self, rows: int, width: int) -> int:
        return PER_MOMENT * width**2

    def solve(self, problem: Problem) -> Solution:
        assert problem.covariance is not None, "the engine provides what 'statistics' names"
        weight, quantizer = problem.weight, fit(problem.spec, problem.weight)
        order = torch.arange(weight.shape[1], device=weight.device)
        if self.ordered:
            order = problem.covariance.diagonal().argsort(descending=True, stable=True)
        factor = problem.factor or functools.partial(inverse_factor, problem.covariance)
        rounded = _round_in_order(weight, quantizer, order, factor(self.damping, order), self.block)
        return Solution(quantizer, quantizer.codes(rounded))


def _round_in_order(weight: Tensor, quantizer: Quantizer, order: Tensor, inverse: Tensor, block: int) -> Tensor:
    """Algorithm 1 of the paper: the rounded weight ``[out, in]``, from the Cholesky factor of the inverse covariance."""
    rounded, work, places = torch.zeros_like(weight), weight[:, order], order.tolist()
    for start in range(0, len(places), block):
        stop = min(start + block, len(places))
        errors = torch.zeros_like(work[:, start:stop])
        for column in range(start, stop):
            value = work[:, column : column + 1]
            # Round one column with the scales of the place it has in storage.
            nearest = quantizer.round_columns(value, places[column])
            # Spread its error over the columns of this block that are still to come ...
            error = (value - nearest) / inverse[column, column]
            work[:, column:stop] -= error * inverse[column, column:stop]
            errors[:, column - start], rounded[:, places[column]] = error[:, 0], nearest[:, 0]
        # ... and over all later blocks at once: one product of matrices instead of many of vectors.
        work[:, stop:] -= errors @ inverse[start:stop, stop:]
    return rounded
