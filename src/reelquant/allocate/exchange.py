"""Choices whose errors add up as vectors: what they do together, and a descent by exchanges from a start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reelquant.allocate.problem import Picks, Problem


def together(grams: np.ndarray, picks: Sequence[int]) -> float:
    """Predicted damage of picks.

    Args:
        grams: ``[choices, units, units]``, products of the errors of two units with the same choice.
        picks: the number of a choice for every unit.
    """
    return float(_together(grams, np.array([picks]))[0])


def descend(grams: np.ndarray, problem: Problem, start: Sequence[int]) -> Picks:
    """The picks after all changes by one choice, of a unit or of two, that do less damage and stay within the budget, the best first."""
    picks, now = np.array(start), together(grams, start)
    while True:
        fitting = _neighbours(picks, problem)
        damages = _together(grams, fitting)
        if not len(damages) or damages.min() >= now * (1 - 1e-9):
            return picks.tolist()
        picks, now = fitting[damages.argmin()], float(damages.min())


def _together(grams: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """The same of many picks ``[plans, units]``: ``[plans]``."""
    chosen = (picks == np.arange(len(grams))[:, None, None]).astype(float)  # [choices, plans, units]
    return ((chosen @ grams) * chosen).sum((0, 2))


def _neighbours(picks: np.ndarray, problem: Problem) -> np.ndarray:
    """Picks ``[plans, units]`` within the budget, with one unit a choice up or down, or with two changed so."""
    units = np.repeat(np.arange(len(picks)), 2)
    to = np.stack([picks - 1, picks + 1], 1).ravel()
    known = (to >= 0) & (to < problem.formats)
    units, to = units[known], to[known]
    one, other = np.triu_indices(len(units))  # a move with itself is that move alone
    apart = (units[one] != units[other]) | (one == other)
    one, other = one[apart], other[apart]
    made = np.tile(picks, (len(one), 1))
    rows = np.arange(len(one))
    made[rows, units[one]] = to[one]
    made[rows, units[other]] = to[other]
    sizes = problem.sizes[np.arange(problem.layers), made].sum(1)
    return made[sizes <= problem.budget * (1 + 1e-12)]
