"""Round every weight to its nearest level."""

from __future__ import annotations

from dataclasses import dataclass

from reelquant.formats import fit
from reelquant.solvers.problem import Problem, Solution, Solver


@dataclass(frozen=True)
class Nearest(Solver):
    """Round to nearest with the scales of the range rule. The solver every other one has to beat."""

    def solve(self, problem: Problem) -> Solution:
        quantizer = fit(problem.spec, problem.weight)
        return Solution(quantizer, quantizer.codes(problem.weight))
