"""Learned rounding of one weight on the second moments of its input: no recorded calls, no other layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from reelquant._errors import RecipeError, nearest
from reelquant.formats import Quantizer
from reelquant.solvers.descent import STARTS
from reelquant.solvers.gptq import PER_MOMENT
from reelquant.solvers.problem import Problem
from reelquant.solvers.solver import Solver
from reelquant.stages import Solution

STRETCH, MARGIN = 0.1, 0.4
"""How far the sigmoid reaches beyond 0 and 1, and how far from one half the share of a level starts, on the side of the starting code."""
SHARPEST, SOFTEST = 2.0, 20.0
"""The last and the first exponent of the regularizer."""


@dataclass(frozen=True)
class Adaround(Solver):
    """Learn which of two neighbouring levels every weight takes, by gradients of ``tr((W - Q) C (W - Q)^T)``.

    The levels are the two around the weight, or the one of the starting code and its neighbour towards the weight. Shares, regularizer and
    warm-up are those of ``{reconstruct: adaround}``, which learns on recorded calls. The start stays where the result has a larger error.

    Attributes:
        start: the solver whose codes are improved, ``nearest`` or ``gptq``.
        iterations: steps of Adam, each on the whole weight.
        rate: its learning rate.
        weight: of the regularizer, in units of the error at the start.
        warmup: share of the iterations without it.

    Paper: AdaRound (arXiv 2004.10568), equation 21, whose layer-wise error in full is a quadratic form of the input's second moments.
    Deviations: these moments (theirs: batches of recorded inputs), centred, because a corrected bias absorbs the mean; no activation behind
    the layer counts; training starts near the codes of a solver (theirs: at the float weight).
    """

    start: str = "nearest"
    iterations: int = 300
    rate: float = 0.2
    weight: float = 10.0
    warmup: float = 0.2
    statistics: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise RecipeError(f"unknown start '{self.start}' of adaround; {nearest(self.start, STARTS)}")
        if self.iterations < 1 or self.rate <= 0 or self.weight < 0 or not 0 <= self.warmup < 1:
            raise RecipeError(f"adaround needs iterations >= 1, rate > 0, weight >= 0 and warmup in [0, 1), got {self}")

    def peak_bytes(self, rows: int, width: int) -> int:
        return PER_MOMENT * width**2 + 10 * 4 * rows * width

    def solve(self, problem: Problem) -> Solution:
        assert problem.covariance is not None, "the engine provides what 'statistics' names"
        start = STARTS[self.start].checked(problem)
        low, high = around(start.quantizer, problem.weight, start.values)
        error = problem.objective(start.values)
        if error <= 0:
            return start
        upper = self._learned(problem, low, high, start.values > low, error)
        found = Solution(start.quantizer, start.quantizer.codes(torch.where(upper, high, low)))
        return found if problem.objective(found.values) < error else start

    def _learned(self, problem: Problem, low: Tensor, high: Tensor, upper: Tensor, error: float) -> Tensor:
        """Whether each weight takes its upper level, ``[out, in]`` bool."""
        assert problem.covariance is not None
        share = ((problem.weight - low) / (high - low).clamp(min=torch.finfo(low.dtype).tiny)).clamp(0, 1)
        share = torch.where(upper, share.clamp(min=0.5 + MARGIN), share.clamp(max=0.5 - MARGIN))
        v = nn.Parameter(torch.logit((share + STRETCH) / (1 + 2 * STRETCH)))
        optimizer = torch.optim.Adam([v], self.rate)
        with torch.enable_grad():
            for iteration in range(self.iterations):
                h = (torch.sigmoid(v) * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)
                rest = low + h * (high - low) - problem.weight
                loss = ((rest @ problem.covariance) * rest).sum() / len(rest) / error
                done = iteration / self.iterations
                if done >= self.warmup:
                    beta = SHARPEST + (SOFTEST - SHARPEST) * (1 - (done - self.warmup) / (1 - self.warmup))
                    loss = loss + self.weight * (1 - (2 * h - 1).abs().pow(beta)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return v.detach() >= 0


def around(quantizer: Quantizer, weight: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The two numbers that each weight may become, the lower one first, ``[out, in]`` each: one of them is where it starts."""
    grain, numbers = quantizer.granularity, quantizer.format.levels().to(weight)
    scale, zero = quantizer.scale[:, None], 0 if quantizer.zero_point is None else quantizer.zero_point[:, None]
    towards, begun = (grain.blocks(values) / scale + zero for values in (weight, start))
    middles = (numbers[1:] + numbers[:-1]) / 2
    place = torch.bucketize(begun.contiguous(), middles)
    below = torch.where(towards < numbers[place], place - 1, place).clamp(0, len(numbers) - 2)
    first, second = ((numbers[below + step] - zero) * scale for step in (0, 1))
    low, high = (quantizer(grain.unblock(values, weight.shape)) for values in (first, second))
    return low, high
