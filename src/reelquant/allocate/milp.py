"""Choose a weight format for every layer with an integer program, from the damage that each format was measured to do."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp

from reelquant._errors import RecipeError
from reelquant.allocate.measured import IN_MEMORY, Measured
from reelquant.allocate.problem import Picks, Problem


@dataclass(frozen=True)
class Milp(Measured):
    """Give every layer one of several weight formats: those with the least total damage that fit into a budget of bits.

    The program minimises the sum of the damages of all layers, one format per layer (the errors of different layers are taken to be
    independent). HiGHS solves it to the optimum.

    Paper: MixDQ (arXiv 2405.17873), the integer program of section 3.4. Deviations: one sensitivity for all layers (the error of the
    denoiser's output) where the paper has one for content and one for quality, each with a program of its own, and scans how they
    share the budget; scales count as bits; inputs keep the format of the recipe.
    """

    word: ClassVar[str] = "milp"
    in_memory: ClassVar[str | None] = IN_MEMORY.format(word)

    def pick(self, problem: Problem) -> Picks:
        return solve(problem.damage, problem.sizes, problem.budget)


def solve(damage: np.ndarray, sizes: np.ndarray, budget: float) -> list[int]:
    """The format of every layer: the least total damage whose total size is at most ``budget``.

    Args:
        damage, sizes: ``[layers, formats]``.
        budget: in the unit of ``sizes``; at least the sum of the smallest sizes.
    """
    layers, formats = damage.shape
    one_each = LinearConstraint(np.kron(np.eye(layers), np.ones(formats)), 1, 1)
    within = LinearConstraint(sizes.reshape(1, -1) / budget, ub=1)
    # HiGHS stops at an absolute gap of 1e-6 as well: damages are scaled so that this is far below what can be measured.
    scaled = damage.ravel() * (1000 / (damage.max() or 1.0))
    bounds, options = Bounds(0, 1), {"mip_rel_gap": 0.0}
    with _unheard():
        found: OptimizeResult = milp(scaled, integrality=1, bounds=bounds, constraints=[one_each, within], options=options)
    if found.x is None:
        raise RecipeError(f"milp found no choice of formats within {budget:.0f}: {found.message}")
    return found.x.reshape(layers, formats).argmax(1).tolist()


@contextmanager
def _unheard() -> Iterator[None]:
    """Inside, the file behind the standard output is another one: HiGHS prints notes for its own developers, whatever its options say."""
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else lambda stream: None  # what C has printed waits in a buffer of its own
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    flush(None)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            flush(None)
            os.dup2(kept, 1)
            os.close(kept)
