"""Remove weights: some of every few consecutive ones of a row become zero, and the others make up for them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from reelquant._errors import RecipeError
from reelquant.formats import Kept, Quantizer, fit
from reelquant.observe import inverse_factor
from reelquant.solvers.gptq import PER_MOMENT
from reelquant.solvers.problem import Problem
from reelquant.solvers.solver import Solver, columns_problem
from reelquant.stages import Solution, StageSite


@dataclass(frozen=True)
class Sparse(Solver):
    """SparseGPT with rounding: column by column, removed or rounded, and the columns to the right make up for both errors.

    Which weights of a group stay is decided when its first column is reached, from what the columns before have left of them: those with
    the largest ``w^2 / [H^-1]_cc``. The layer stores the kept codes and a bit per weight (:class:`reelquant.formats.Kept`), so int8 with
    2:4 takes 5 bits a weight. Layers compute with zeros in their place: no kernel here skips them, so they are smaller and not faster.

    Attributes:
        keep: how many of consecutive weights of a row stay, ``2:4`` or ``42:64``.
        compensate: False keeps the largest weights, rounds them to nearest, and needs no data.
        damping: share of each input's own variance that is added to the diagonal of the covariance.
        block: columns whose updates are applied together, at least.

    Papers: SparseGPT (arXiv 2301.00774), algorithm 1 with n:m groups and joint rounding; GPUSQ-ViT (arXiv 2305.10727) has 2:4 with 8 and 4
    bits. Deviations: the covariance is centred and its damping relative to each input's variance, as in gptq; every row keeps as many
    weights as another one, of ``OF`` consecutive ones (SparseGPT without n:m: of a block of 128 columns, whatever the row), so that rows
    are stored in equal lengths; scales are those of the whole weight; nothing is distilled (GPUSQ-ViT: both by training).
    """

    keep: str = "2:4"
    compensate: bool = True
    damping: float = 0.01
    block: int = 64
    statistics: ClassVar[frozenset[str]] = frozenset({"gram"})
    untrainable: ClassVar[str | None] = "of which weights were removed, which training would bring back"
    fills: ClassVar[frozenset[str]] = frozenset({"columns"})  # it counts all columns, stored or not

    def __post_init__(self) -> None:
        _ = self.pattern
        if not 0 < self.damping < 1 or self.block < 1:
            raise RecipeError(f"sparse needs damping in (0, 1) and block >= 1, got {self.damping} and {self.block}")

    @property
    def pattern(self) -> Kept:
        """:attr:`keep`, read."""
        return Kept.parse(self.keep)

    @property
    def needs_data(self) -> bool:
        return self.compensate

    def needs(self, site: StageSite) -> frozenset[str]:
        return self.statistics if self.compensate else frozenset()

    def supports(self, site: StageSite) -> str | None:
        return columns_problem("sparse", site)

    def peak_bytes(self, rows: int, width: int) -> int:
        return (PER_MOMENT * width**2 if self.compensate else 0) + 24 * rows * width

    def stored_bytes(self, site: StageSite) -> int:
        rows, width = site.layer.shape[0], 1
        for size in site.layer.shape[1:]:
            width *= size
        bits = site.specs.weight.format.bits
        return rows * (self.pattern.row_bytes(width, bits) - -(-width * bits // 8))

    def solve(self, problem: Problem) -> Solution:
        quantizer = fit(problem.spec, problem.weight)
        values = self._compensated(problem, quantizer) if self.compensate else self._largest(problem.weight, quantizer)
        zeros = quantizer.codes(torch.zeros_like(values))
        return Solution(quantizer, torch.where(values == 0, zeros, quantizer.codes(values)), kept=self.keep)

    def checked(self, problem: Problem) -> Solution:
        """The solution, or the largest weights where compensation loses to them on its own objective."""
        found = replace(self.solve(problem), solver="sparse")
        if not self.compensate:
            return found
        largest = replace(self, compensate=False).solve(problem)
        worse = problem.objective(found.values) > problem.objective(largest.values)
        return replace(largest, solver="largest", replaced="sparse") if worse else found

    def _largest(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        kept = self.pattern.best(self.pattern.in_groups(weight.abs(), -1.0)).flatten(1)[:, : weight.shape[1]]
        return quantizer(weight) * kept

    def _compensated(self, problem: Problem, quantizer: Quantizer) -> Tensor:
        assert problem.covariance is not None, "the engine provides what 'statistics' names"
        weight, pattern = problem.weight, self.pattern
        factor = problem.factor or functools.partial(inverse_factor, problem.covariance)
        inverse = factor(self.damping, torch.arange(weight.shape[1], device=weight.device))
        rounded, work = torch.zeros_like(weight), weight.clone()
        step = max(self.block // pattern.of, 1) * pattern.of
        for start in range(0, weight.shape[1], step):
            stop = min(start + step, weight.shape[1])
            errors = torch.zeros_like(work[:, start:stop])
            kept = torch.empty(0)
            for column in range(start, stop):
                if column % pattern.of == 0:
                    group = slice(column, min(column + pattern.of, stop))
                    scores = (work[:, group] / inverse.diagonal()[group]).square()
                    kept = pattern.best(pattern.in_groups(scores, -1.0)).flatten(1)
                value = work[:, column : column + 1]
                place = column % pattern.of
                stays = kept[:, place : place + 1]
                new = torch.where(stays, quantizer.round_columns(value, column), 0.0)
                error = (value - new) / inverse[column, column]
                work[:, column:stop] -= error * inverse[column, column:stop]
                errors[:, column - start], rounded[:, column] = error[:, 0], new[:, 0]
            work[:, stop:] -= errors @ inverse[start:stop, stop:]
        return rounded
