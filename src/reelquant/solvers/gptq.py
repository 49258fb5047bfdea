"""Round column by column and let the columns to the right make up for each error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from reelquant._errors import RecipeError
from reelquant.formats import QuantSpec, fit
from reelquant.observe import Need, inverse_factor
from reelquant.solvers.problem import Problem, Solution, Solver


@dataclass(frozen=True)
class Gptq(Solver):
    """GPTQ with static scales.

    Attributes:
        damping: share of each input's own variance that is added to the diagonal of the covariance.
        block: columns whose updates are applied together.

    Paper: GPTQ (arXiv 2210.17323), algorithm 1. Deviations: the matrix is the *centred* covariance of the input, because a corrected
    bias absorbs the mean; damping is relative to each input's variance (theirs: to the mean of all), so that one factorization serves all
    rescalings of the channels; group scales are those of the untouched weight ("static groups"), so scales and codes stay consistent.
    """

    damping: float = 0.01
    block: int = 64
    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        if not 0 < self.damping < 1:
            raise RecipeError(f"damping lies in (0, 1), got {self.damping}")

    def supports(self, spec: QuantSpec) -> str | None:
        kinds = ("tensor", "channel", "group")
        return None if spec.granularity.kind in kinds else f"gptq needs weight granularity {', '.join(kinds)}, got {spec.granularity}"

    def solve(self, problem: Problem) -> Solution:
        assert problem.covariance is not None, "the engine provides what needs names"
        quantizer = fit(problem.spec, problem.weight)
        rounded = torch.zeros_like(problem.weight)
        inverse = problem.factor(self.damping) if problem.factor else inverse_factor(problem.covariance, self.damping)
        work = problem.weight.clone()
        width = work.shape[1]
        for start in range(0, width, self.block):
            stop = min(start + self.block, width)
            errors = torch.zeros_like(work[:, start:stop])
            for column in range(start, stop):
                value = work[:, column : column + 1]
                rounded[:, column : column + 1] = quantizer.round_columns(value, column)
                error = (value - rounded[:, column : column + 1]) / inverse[column, column]
                work[:, column:stop] -= error * inverse[column, column:stop]
                errors[:, column - start] = error[:, 0]
            work[:, stop:] -= errors @ inverse[start:stop, stop:]
        codes = quantizer.codes(rounded)
        return Solution(quantizer, codes, problem.objective(quantizer.dequantize(codes)))
