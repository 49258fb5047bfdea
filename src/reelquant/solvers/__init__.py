"""Which codes one weight gets, one file per algorithm. What looks at several layers at once is a reconstruction, and what chooses formats
is an allocator: neither belongs here."""

from __future__ import annotations

import functools

from reelquant.solvers.adaround import Adaround
from reelquant.solvers.als import Als
from reelquant.solvers.comq import Comq
from reelquant.solvers.gptq import Gptq
from reelquant.solvers.nearest import Nearest
from reelquant.solvers.problem import Problem, problem_of
from reelquant.solvers.sigma_delta import SigmaDelta
from reelquant.solvers.solver import Solver
from reelquant.solvers.sparse import Sparse
from reelquant.solvers.stored import Stored
from reelquant.stages import Solution, register

SOLVERS: dict[str, type[Solver]] = {
    "nearest": Nearest,
    "gptq": Gptq,
    "comq": Comq,
    "als": Als,
    "sigma_delta": SigmaDelta,
    "adaround": Adaround,
    "sparse": Sparse,
    "stored": Stored,
}
register_solver = functools.partial(register, SOLVERS, "solver")

__all__ = [
    "SOLVERS",
    "Adaround",
    "Als",
    "Comq",
    "Gptq",
    "Nearest",
    "Problem",
    "SigmaDelta",
    "Solution",
    "Solver",
    "Sparse",
    "Stored",
    "problem_of",
    "register_solver",
]
