"""Sigma-delta: the rounding error of a column is added to the next one, so that errors of neighbours cancel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from reelquant._errors import RecipeError
from reelquant.formats import fit
from reelquant.solvers.problem import Problem
from reelquant.solvers.solver import Solver, columns_problem
from reelquant.stages import Solution, StageSite


@dataclass(frozen=True)
class SigmaDelta(Solver):
    """Error feedback along the columns, as converters of sound shape their noise.

    Where neighbouring inputs are alike, as pixels below a convolution's window are, errors that cancel between neighbours do not
    reach the output. Elsewhere rounding to nearest is better, and layers where it is keep it. The second moments of the input decide;
    the codes do not depend on them.

    Attributes:
        feedback: share of a column's error that the next column takes over.

    Paper: Sigma-Delta and Distributed Noise-Shaping Quantization Methods for Random Fourier Features (arXiv 2106.02614), the filter
    of first order with one pass. Deviations: it runs along the columns of a weight matrix (theirs: along features of one vector);
    ``feedback`` below 1 leaks.
    """

    feedback: float = 1.0
    statistics: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        if not 0 < self.feedback <= 1:
            raise RecipeError(f"feedback of sigma_delta lies in (0, 1], got {self.feedback}")

    def supports(self, site: StageSite) -> str | None:
        return columns_problem("sigma_delta", site)

    def solve(self, problem: Problem) -> Solution:
        quantizer = fit(problem.spec, problem.weight)
        rounded, carried = torch.zeros_like(problem.weight), torch.zeros_like(problem.weight[:, :1])
        for column in range(rounded.shape[1]):
            wanted = problem.weight[:, column : column + 1] + self.feedback * carried
            rounded[:, column : column + 1] = quantizer.round_columns(wanted, column)
            carried = wanted - rounded[:, column : column + 1]
        return Solution(quantizer, quantizer.codes(rounded))
