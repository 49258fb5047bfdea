"""The base class of solvers: each chooses the codes of one weight at a time."""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

from reelquant.solvers.problem import Problem, problem_of
from reelquant.stages import LayerWork, Solution, Stage, StageSite

COLUMNS = ("tensor", "channel", "group")
"""Granularities with which a column of a weight has one scale per row (:meth:`reelquant.formats.Quantizer.round_columns`)."""


def columns_problem(name: str, site: StageSite) -> str | None:
    """Why a solver that works column by column cannot solve a layer, or None."""
    grain = site.specs.weight.granularity
    return None if grain.kind in COLUMNS else f"{name} needs weight granularity {', '.join(COLUMNS)}, got {grain}"


@dataclass(frozen=True)
class Unsolved(Stage):
    """Leaves the codes to the engine, which rounds to nearest where no stage chose any."""

    correct_bias: bool

    def solve_layer(self, layer: LayerWork) -> LayerWork:
        return replace(layer, correct_bias=self.correct_bias)


@dataclass(frozen=True)
class Solver(Stage):
    """Chooses codes.

    Attributes:
        correct_bias: let the bias take over the mean error that rounding the weight leaves; needs calibration.
    """

    correct_bias: bool = field(default=False, kw_only=True)
    exclusive: ClassVar[bool] = True

    def draft(self) -> Stage:
        """Rounding to nearest: solvers would take most of a search's time."""
        return Unsolved(self.correct_bias)

    @abstractmethod
    def solve(self, problem: Problem) -> Solution:
        """Codes for one weight."""

    def solve_layer(self, layer: LayerWork) -> LayerWork:
        return replace(layer, solution=self.checked(problem_of(layer)), correct_bias=self.correct_bias)

    def checked(self, problem: Problem) -> Solution:
        """The solution, or rounding to nearest with its scales where the solver loses to that on its own objective."""
        solution = replace(self.solve(problem), solver=name_of(type(self)))
        codes = solution.quantizer.codes(problem.weight)
        nearest = replace(solution, codes=codes, solver="nearest", replaced=solution.solver)
        return solution if problem.objective(solution.values) <= problem.objective(nearest.values) else nearest


def name_of(member: type[Solver]) -> str:
    """How reports call a solver: the name of its class in the form of recipes, ``SigmaDelta`` as ``sigma_delta``."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", member.__name__).lower()
