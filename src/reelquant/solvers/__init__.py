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
    codes = found.quantizer.codes(problem.weight)
    error = problem.objective(found.quantizer.dequantize(codes))
    if found.error <= error:
        return found
    return Solution(found.quantizer, codes, error, replaced=type(solver).__name__.lower())


def register_solver(name: str, solver: type[Solver]) -> None:
    """Add a solver under a new name (plug-ins). Raises :class:`RecipeError` if the name is taken."""
    if name in SOLVERS:
        raise RecipeError(f"solver '{name}' exists already; choose another name")
    SOLVERS[name] = solver


__all__ = ["SOLVERS", "Gptq", "Nearest", "Problem", "Solution", "Solver", "register_solver", "solve"]
