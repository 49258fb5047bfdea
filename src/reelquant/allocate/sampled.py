"""Draw allocations at random, learn from the best of them which formats layers should get, and draw again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from reelquant._errors import RecipeError
from reelquant.allocate.greedy import climbed
from reelquant.allocate.measured import IN_MEMORY, Measured
from reelquant.allocate.problem import Picks, Problem

ROUNDS, DRAWS, ELITE = 15, 60, 8
SMOOTHING = 0.7  # weight of the elite of a round in the distribution of the next one
CHANGED = 0.3  # share of the layers that a draw near an allocation may change
TRIED = 6  # finalists that are tried out, where trials are possible


def drawn(problem: Problem, chances: np.ndarray, generator: np.random.Generator) -> Picks:
    """One allocation within the budget: formats by ``chances [layers, formats]``, then layers made smaller or larger in random order."""
    above = generator.random(problem.layers)[:, None] >= chances.cumsum(1)[:, :-1]
    picks = above.sum(1)
    order, rows = generator.permutation(problem.layers), np.arange(problem.layers)
    spent = problem.sizes[rows, picks].sum()
    for layer in order:  # too large: the next smaller size, layer after layer
        if spent <= problem.budget:
            break
        spent += _moved(problem, picks, layer, int(problem.sizes[layer].argmin()))
    for layer in order:  # room left: the largest size that fits
        room = problem.budget - spent + problem.sizes[layer, picks[layer]]
        fitting = np.flatnonzero(problem.sizes[layer] <= room)
        spent += _moved(problem, picks, layer, int(fitting[problem.sizes[layer, fitting].argmax()])) if len(fitting) else 0
    return picks.tolist()


def _moved(problem: Problem, picks: np.ndarray, layer: int, fmt: int) -> float:
    before, picks[layer] = problem.sizes[layer, picks[layer]], fmt
    return float(problem.sizes[layer, fmt] - before)


def random_picks(problem: Problem, count: int) -> list[Picks]:
    """Allocations that know nothing of damages, all within the budget and near it: what a search has to beat."""
    generator = np.random.default_rng(problem.seed)
    flat = np.full(problem.damage.shape, 1 / problem.formats)
    return [drawn(problem, flat, generator) for _ in range(count)]


def around(problem: Problem, best: Picks, count: int) -> list[Picks]:
    """Allocations near one of them: a layer in :data:`CHANGED` gets any format, and the rest is made to fit the budget again."""
    generator = np.random.default_rng(problem.seed)
    chances = np.full(problem.damage.shape, CHANGED / problem.formats)
    chances[np.arange(problem.layers), best] += 1 - CHANGED
    return [drawn(problem, chances, generator) for _ in range(count)]


def cross_entropy(problem: Problem) -> Picks:
    """The best allocation of :data:`ROUNDS` rounds of draws; each round is drawn by what the best of the one before had in common.

    The uniform allocation and the smallest one, upgraded where that saves most, take part, so the result is never predicted to be worse.
    Where trials are possible, the last best ones are tried out and the trial decides.
    """
    generator = np.random.default_rng(problem.seed)
    chances = np.full(problem.damage.shape, 1 / problem.formats)
    best = [climbed(problem, start) for start in problem.starts()]
    for _ in range(ROUNDS):
        draws = [drawn(problem, chances, generator) for _ in range(DRAWS)]
        best = _distinct(sorted([*best, *draws], key=problem.predicted))[:ELITE]
        shares = np.stack([(np.array(best) == fmt).mean(0) for fmt in range(problem.formats)], axis=1)
        chances = SMOOTHING * shares + (1 - SMOOTHING) * chances
        chances /= chances.sum(1, keepdims=True)
    return best[0] if problem.trial is None else min(finalists(problem, best)[:TRIED], key=problem.trial)


def finalists(problem: Problem, picks: list[Picks]) -> list[Picks]:
    """Those of the picks, best first, that are predicted to be no worse than the uniform allocation. The first of them always is."""
    uniform = problem.uniform()
    limit = np.inf if uniform is None else problem.predicted(uniform)
    return [picks[0], *(one for one in picks[1:] if problem.predicted(one) <= limit)]


def _distinct(picks: list[Picks]) -> list[Picks]:
    return [list(one) for one in dict.fromkeys(map(tuple, picks))]


@dataclass(frozen=True)
class Sampled(Measured):
    """Give every layer one of several weight formats by a search that draws whole allocations: :func:`cross_entropy`.

    Attributes:
        seed: of the draws.

    Paper: FLIQS (arXiv 2308.03290) searches formats with a learned policy. Deviations: a distribution per layer fitted to the best draws
    (the cross-entropy method) instead of reinforcement learning, the sum of measured damages instead of the reward of a supernet, and no
    retraining.
    """

    seed: int = 0
    word: ClassVar[str] = "sampled"
    in_memory: ClassVar[str | None] = IN_MEMORY.format(word)

    @property
    def trials(self) -> int:
        return TRIED

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**32:
            raise RecipeError(f"sampled.seed lies between 0 and 2**32, got {self.seed}")

    def pick(self, problem: Problem) -> Picks:
        return cross_entropy(problem)
