"""Codes by coordinate descent alone; scales stay as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reelquant.solvers.descent import STARTS, Descent, descend
from reelquant.solvers.problem import Problem
from reelquant.stages import Solution


@dataclass(frozen=True)
class Comq(Descent):
    """Coordinate descent on the second moments of the input, without gradients or a factorization.

    With the error ``E`` of all weights and the covariance ``C``, the best value of column ``i`` is ``q_i - (E C)_i / C_ii``: the
    objective is a parabola in each weight, so the level nearest to that value is the best one. No change raises the objective.

    The work ends when a pass changes nothing.

    Paper: COMQ (arXiv 2403.07134). Deviations: scales stay those of the range rule (solver ``als`` changes them); the covariance is
    centred, because a corrected bias absorbs the mean; columns are visited in the order of their input variance alone (theirs: times
    the size of the weights); the start may be gptq.
    """

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
