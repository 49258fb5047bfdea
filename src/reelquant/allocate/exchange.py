"""Choices whose errors add up as vectors: what they do together, and a descent by exchanges from a start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reelquant.allocate.problem import Picks, Problem


def together(grams: np.ndarray, picks: Sequence[int]) -> float:
    """Predicted damage of picks.

    Args:
        grams: ``[choices, units, units]``, products of the errors of two units with the same choice; symmetric.
        picks: the number of a choice for every unit.
    """
    chosen = _chosen(grams, np.array(picks))
    return float(np.einsum("cs,cst,ct->", chosen, grams, chosen))


def descend(grams: np.ndarray, problem: Problem, start: Sequence[int]) -> Picks:
    """The picks after all changes by one choice, of a unit or of two, that do less damage and stay within the budget, the best first."""
    picks, now = np.array(start), together(grams, start)
    while True:
        units, to, changes = _changes(grams, problem, picks)
        one, other = np.unravel_index(changes.argmin(), changes.shape)
        made = picks.copy()
        made[units[one]], made[units[other]] = to[one], to[other]
        if not (found := together(grams, made)) < now * (1 - 1e-9):
            return picks.tolist()
        picks, now = made, found


def _chosen(grams: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """``[choices, units]``, 1 where a unit has a choice."""
    return (np.arange(len(grams))[:, None] == picks).astype(float)


def _changes(grams: np.ndarray, problem: Problem, picks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moves of one unit to a choice up or down, as units and choices ``[moves]``, and what the damage changes by with two of them
    ``[moves, moves]``, with one alone on the diagonal; infinite where it cannot be or the budget is exceeded."""
    units = np.repeat(np.arange(len(picks)), 2)
    to = np.stack([picks - 1, picks + 1], 1).ravel()
    known = (to >= 0) & (to < problem.formats)
    units, to = units[known], to[known]
    now, field = picks[units], np.einsum("cst,ct->cs", grams, _chosen(grams, picks))
    alone = 2 * (field[to, units] - field[now, units]) + grams[to, units, units] + grams[now, units, units]
    pairs = alone[:, None] + alone
    for mine, sign in ((now, -1), (to, 1)):
        between = grams[mine[:, None], units[:, None], units]  # with my choice
        pairs += 2 * sign * between * ((mine[:, None] == to).astype(float) - (mine[:, None] == now))
    np.fill_diagonal(pairs, alone)
    sizes = problem.sizes[units, to] - problem.sizes[units, now]
    grown = sizes[:, None] + sizes
    np.fill_diagonal(grown, sizes)
    twice = (units[:, None] == units) & ~np.eye(len(units), dtype=bool)
    over = problem.size(picks.tolist()) + grown > problem.budget * (1 + 1e-12)
    return units, to, np.where(twice | over, np.inf, pairs)
