"""Which codes. One file per algorithm; the table below is what recipes can name."""

from __future__ import annotations

from dataclasses import replace

from reelquant._errors import RecipeError
from reelquant.solvers.gptq import Gptq
from reelquant.solvers.nearest import Nearest
from reelquant.solvers.problem import Problem, Solution, Solver

SOLVERS: dict[str, type[Solver]] = {"nearest": Nearest, "gptq": Gptq}


def solve(solver: Solver, problem: Problem) -> Solution:
    """Solve, and keep ``nearest`` where the solver loses to it on its own objective."""
    found, plain = solver.solve(problem), Nearest().solve(problem)
    if found.error <= plain.error:
        return found
    name = next(name for name, kind in SOLVERS.items() if isinstance(solver, kind))
    return replace(plain, replaced=name)


def register_solver(name: str, solver: type[Solver]) -> None:
    """Add a solver under a new name (plug-ins). Raises :class:`RecipeError` if the name is taken."""
    if name in SOLVERS:
        raise RecipeError(f"solver '{name}' exists already; choose another name")
    SOLVERS[name] = solver


__all__ = ["SOLVERS", "Gptq", "Nearest", "Problem", "Solution", "Solver", "register_solver", "solve"]
