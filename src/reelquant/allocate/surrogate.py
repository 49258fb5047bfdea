"""Learn from allocations that were tried out what each format really does beside all the others, and choose by that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from reelquant._errors import RecipeError
from reelquant.allocate.measured import IN_MEMORY, Measured
from reelquant.allocate.milp import solve
from reelquant.allocate.problem import Picks, Problem
from reelquant.allocate.sampled import around, finalists, random_picks

RIDGES = tuple(10.0**power for power in range(-3, 5))


def learned(damage: np.ndarray, tried: Sequence[tuple[Sequence[int], float]]) -> np.ndarray:
    """Damages ``[layers, formats]`` that explain what whole allocations did.

    Ridge regression on the one-hot codes of layer x format. A coefficient is a factor of the damage that the layer does alone, and is drawn
    towards the factor that all of them share; errors count relative to what was measured. The strength is the one with the least error of
    allocations that are left out, one at a time.

    Args:
        damage: of every layer alone.
        tried: allocations with their measured damage, two at least.
    """
    picks = np.array([list(one) for one, _ in tried])
    wanted = np.array([value for _, value in tried])
    layers, formats = damage.shape
    parts = damage[np.arange(layers), picks]
    common = float(np.exp(np.median(np.log(np.maximum(wanted, 1e-30)) - np.log(np.maximum(parts.sum(1), 1e-30)))))
    columns = np.zeros((len(picks), layers * formats))
    np.put_along_axis(columns, np.arange(layers) * formats + picks, parts * common / wanted[:, None], axis=1)
    rest = 1 - columns.sum(1)
    kernel = columns @ columns.T
    strength = min(RIDGES, key=lambda ridge: _left_out(kernel, rest, ridge * np.trace(kernel) / len(kernel)))
    ridge = strength * np.trace(kernel) / len(kernel)
    factors = 1 + columns.T @ np.linalg.solve(kernel + ridge * np.eye(len(kernel)), rest)
    return damage * common * np.maximum(factors, 0.05).reshape(layers, formats)


def _left_out(kernel: np.ndarray, rest: np.ndarray, ridge: float) -> float:
    """Mean squared error of every row when it is predicted from all others, in closed form."""
    inverse = np.linalg.inv(kernel + max(ridge, 1e-12) * np.eye(len(kernel)))
    return float(np.square(inverse @ rest / np.diag(inverse)).mean())


def surrogate(problem: Problem, samples: int) -> Picks:
    """The allocation that the learned damages call best.

    Allocations are learned from those that were tried before, and from ``samples`` new ones where trials are possible: half at random,
    half near the optimum of the damages as they were measured. The last choice, between this allocation and that of the measured damages,
    is made by a trial, if one is possible.
    """
    plain = solve(problem.damage, problem.sizes, problem.budget)
    tried = [*problem.tried]
    if problem.trial is not None:
        tried += [(picks, problem.trial(picks)) for picks in _samples(problem, plain, samples)]
    if len(tried) < 2:
        raise RecipeError(
            f"a surrogate learns from allocations that were tried, and there are {len(tried)}: measure some "
            "(reelquant sensitivity --configurations 64), or choose by milp"
        )
    other = solve(learned(problem.damage, tried), problem.sizes, problem.budget)
    allowed = finalists(problem, [plain, other])
    return allowed[-1] if problem.trial is None or len(allowed) == 1 else min(allowed, key=problem.trial)


def _samples(problem: Problem, near: Picks, count: int) -> list[Picks]:
    return [*random_picks(problem, count - count // 2), *around(problem, near, count // 2)]


@dataclass(frozen=True)
class Surrogate(Measured):
    """Give every layer one of several weight formats by what whole allocations did: :func:`surrogate`.

    Attributes:
        samples: allocations that are tried out to learn from.

    Paper: Qua2SeDiMo (arXiv 2412.14628) learns additive sensitivities from 500 sampled configurations. Deviations: a ridge regression on
    one-hot codes, drawn towards the damage that each layer does alone, instead of a network on the graph of the denoiser; the error of the
    denoiser's output instead of FID; tens of samples instead of hundreds; integers instead of k-means.
    """

    samples: int = 48
    word: ClassVar[str] = "surrogate"
    in_memory: ClassVar[str | None] = IN_MEMORY.format(word)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2:
            raise RecipeError(f"surrogate.samples is at least 2, got {self.samples}")

    @property
    def trials(self) -> int:
        return self.samples + 2

    def pick(self, problem: Problem) -> Picks:
        return surrogate(problem, self.samples)
