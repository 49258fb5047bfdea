"""Alternating least squares: the best scales for the codes, then better codes for these scales, and again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reelquant.formats import Quantizer
from reelquant.solvers.descent import STARTS, Descent, descend
from reelquant.solvers.problem import Problem
from reelquant.stages import Solution, storable


@dataclass(frozen=True)
class Als(Descent):
    """Least squares on the second moments of the input, for scales and codes in turns.

    A weight is a scale times a level, so the objective is a parabola in each scale, too: ``s - (E C, u) / (u C, u)`` is the best
    scale of a unit with levels ``u`` while all others stay. It is rounded to a number that the layer can store. Codes follow by
    coordinate descent. No change raises the objective.

    Papers: BitsFusion (arXiv 2406.04333) finds scales and codes of few bits in turns, on the weight alone; COMQ (arXiv 2403.07134)
    has scales among its coordinates. Ours: both on the covariance of the input, one scale after the other; zero points stay.
    """

    def solve(self, problem: Problem) -> Solution:
        best = found = STARTS[self.start].checked(problem)
        lowest = problem.objective(best.values)
        for _ in range(self.passes):
            quantizer = better_scales(problem, found.quantizer, found.codes)
            values = descend(problem, quantizer, quantizer.dequantize(found.codes))
            found = Solution(quantizer, quantizer.codes(values))
            objective = problem.objective(found.values)
            if not objective < lowest:
                break
            best, lowest = found, objective
        return best


def better_scales(problem: Problem, quantizer: Quantizer, codes: Tensor) -> Quantizer:
    """The quantizer whose scales are the best for these codes, one after the other."""
    covariance, weight = problem.covariance, problem.weight
    assert covariance is not None, "the engine provides what 'statistics' names"
    levels = replace(quantizer, scale=torch.ones_like(quantizer.scale)).dequantize(codes)
    slopes = (quantizer.dequantize(codes) - weight) @ covariance
    scales, together = quantizer.scale.clone(), quantizer.granularity.kind == "tensor"
    table = scales.reshape(1 if together else len(weight), -1)
    for group, columns in enumerate(_columns(quantizer, weight.shape[1])):
        some = levels[:, columns]
        slope, bend = (slopes[:, columns] * some).sum(1), ((some @ covariance[columns, columns]) * some).sum(1)
        old = table[:, group]
        slope, bend = (slope.sum()[None], bend.sum()[None]) if together else (slope, bend)
        new = _better(quantizer, group, table, old - slope / bend)
        slopes += ((new - old)[:, None] * some) @ covariance[columns]
        table[:, group] = new
    return replace(quantizer, scale=scales)


def _columns(quantizer: Quantizer, width: int) -> list[slice]:
    """The columns of a row that share a scale, in the order of its scales."""
    grain = quantizer.granularity
    size = max(grain.size if grain.kind == "group" else width, 1)
    return [slice(first, min(first + size, width)) for first in range(0, width, size)]


def _better(quantizer: Quantizer, group: int, table: Tensor, best: Tensor) -> Tensor:
    """Storable scales of a group of columns, nearer to the best ones than the old scales; else these."""
    old = table[:, group]
    wanted = torch.where((best > 0) & best.isfinite(), best, old)
    new = storable(quantizer, wanted)
    return torch.where((new > 0) & new.isfinite() & ((new - wanted).abs() < (old - wanted).abs()), new, old)
