"""Round every weight to its nearest level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from reelquant.formats import fit
from reelquant.solvers.problem import Problem
from reelquant.solvers.solver import Solver
from reelquant.stages import Solution


@dataclass(frozen=True)
class Nearest(Solver):
    """Round to nearest with the scales of the range rule. The solver that every other one has to beat."""

    samples: ClassVar[bool] = False

    def solve(self, problem: Problem) -> Solution:
        quantizer = fit(problem.spec, problem.weight)
        return Solution(quantizer, quantizer.codes(problem.weight))

    def checked(self, problem: Problem) -> Solution:
        return self.solve(problem)  # comparing it with itself would double the time of recipes without data
