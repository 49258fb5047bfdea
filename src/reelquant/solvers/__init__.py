"""Which codes. One file per algorithm; the table below is what recipes can name."""

from __future__ import annotations

from reelquant._errors import RecipeError
from reelquant.solvers.gptq import Gptq
from reelquant.solvers.nearest import Nearest
from reelquant.solvers.problem import Problem, Solution, Solver

SOLVERS: dict[str, type[Solver]] = {"nearest": Nearest, "gptq": Gptq}


def solve(solver: Solver, problem: Problem) -> Solution:
    """Solve, and keep rounding to nearest with the solver's scales where the solver loses to it on its own objective."""
    found = solver.solve(problem)
    if type(solver) is Nearest:  # nothing to hold it against, and passes over large weights are what quantizing without data takes
        return found
    nearest = Solution(found.quantizer, found.quantizer.codes(problem.weight), replaced=type(solver).__name__.lower())
    return found if problem.objective(found.values) <= problem.objective(nearest.values) else nearest


def register_solver(name: str, solver: type[Solver]) -> None:
    """Add a solver under a new name (plug-ins). Raises :class:`RecipeError` if the name is taken."""
    if name in SOLVERS:
        raise RecipeError(f"solver '{name}' exists already; choose another name")
    SOLVERS[name] = solver


__all__ = ["SOLVERS", "Gptq", "Nearest", "Problem", "Solution", "Solver", "register_solver", "solve"]
