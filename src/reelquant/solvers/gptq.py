"""Round column by column and let the columns to the right make up for each error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from reelquant._errors import RecipeError
from reelquant.formats import QuantSpec, fit
from reelquant.observe import inverse_factor
from reelquant.solvers.problem import Problem, Solution, Solver


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
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        if not 0 < self.damping < 1:
            raise RecipeError(f"damping lies in (0, 1), got {self.damping}")

    def supports(self, spec: QuantSpec) -> str | None:
        kinds = ("tensor", "channel", "group")
        return None if spec.granularity.kind in kinds else f"gptq needs weight granularity {', '.join(kinds)}, got {spec.granularity}"

    def solve(self, problem: Problem) -> Solution:
        assert problem.covariance is not None, "the engine provides what needs names"
        quantizer = fit(problem.spec, problem.weight)
        order = torch.arange(problem.weight.shape[1], device=problem.weight.device)
        order = problem.covariance.diagonal().argsort(descending=True, stable=True) if self.ordered else order
        inverse = problem.factor(self.damping, order) if problem.factor else inverse_factor(problem.covariance, self.damping, order)
        rounded, work, places = torch.zeros_like(problem.weight), problem.weight[:, order], order.tolist()
        for start in range(0, len(places), self.block):
            stop = min(start + self.block, len(places))
            errors = torch.zeros_like(work[:, start:stop])
            for column in range(start, stop):
                value = work[:, column : column + 1]
                nearest = quantizer.round_columns(value, places[column])
                error = (value - nearest) / inverse[column, column]
                work[:, column:stop] -= error * inverse[column, column:stop]
                errors[:, column - start], rounded[:, places[column]] = error[:, 0], nearest[:, 0]
            work[:, stop:] -= errors @ inverse[start:stop, stop:]
        return Solution(quantizer, quantizer.codes(rounded))
