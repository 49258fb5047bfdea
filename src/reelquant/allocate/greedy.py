"""Spend a budget step by step on the layer where the next bytes save most damage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from reelquant.allocate.measured import IN_MEMORY, Measured
from reelquant.allocate.problem import Picks, Problem


def greedy(problem: Problem) -> Picks:
    """Upgrade one layer after the other, always the one with the largest saving of damage per byte that still fits.

    An upgrade may jump over formats, so a format that is no better than a smaller one is no obstacle. It begins once with the smallest
    formats and once with the best uniform one, and the better end is taken.
    """
    return min((climbed(problem, start) for start in problem.starts()), key=problem.predicted)


def climbed(problem: Problem, start: Sequence[int]) -> Picks:
    """The picks after all upgrades that fit and do no harm."""
    picks, rows = np.array(start), np.arange(problem.layers)
    while True:
        now_damage, now_size = problem.damage[rows, picks], problem.sizes[rows, picks]
        saved, cost = now_damage[:, None] - problem.damage, problem.sizes - now_size[:, None]
        possible = (saved >= 0) & (cost <= problem.budget - now_size.sum()) & ((saved > 0) | (cost > 0)) & (cost >= 0)
        if not possible.any():
            return picks.tolist()
        worth = np.where(possible, saved / np.maximum(cost, 1e-9), -1.0)
        layer, fmt = np.unravel_index(int(worth.argmax()), worth.shape)
        picks[layer] = fmt


@dataclass(frozen=True)
class Greedy(Measured):
    """Give every layer one of several weight formats, byte by byte where they save most damage: :func:`greedy`.

    Paper: MPTQ-ViT (arXiv 2401.14895) divides bits greedily. Deviations: formats instead of numbers of bits, bytes with scales as the cost,
    and the error of the denoiser's output, as :class:`Measured` has it, as the damage.
    """

    word: ClassVar[str] = "greedy"
    in_memory: ClassVar[str | None] = IN_MEMORY.format(word)

    def pick(self, problem: Problem) -> Picks:
        return greedy(problem)
