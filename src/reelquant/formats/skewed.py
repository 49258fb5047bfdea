"""Formats for skewed values: log2, log_uniform and power. All count every code, zero and sign included, so budgets compare fairly.

Units here are values divided by their largest magnitude, so the levels lie in ``[-1, 1]``. Each has a small family of shapes and
``fit`` searches it.

Paper: QVD (arXiv 2407.11585), high temporal discriminability quantization. The published port (PaddleSlim, example/QVD) has the log2
and the mixed log-uniform quantizer; ours keep the sign inside the bit budget (theirs outside), allow fractional octaves (``tau``), and
search on a criterion given by the caller (theirs: plain L2). ``power`` is ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from reelquant.formats.number import Criterion, LevelFormat, NumberFormat
from reelquant.formats.ranges import scale_and_zero_point

EDGES = 40  # candidate edges of log_uniform
TAUS = (1, 2, 4, 8)  # levels per octave
GAMMAS = tuple(1 + i / 10 for i in range(31))


def _best(candidates: Iterable[LevelFormat], values: Tensor, criterion: Criterion) -> LevelFormat:
    """The candidate with the largest criterion after rounding ``values`` with the scale that covers them all."""
    values = values.float()
    low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)

    def score(candidate: LevelFormat) -> float:
        scale, _ = scale_and_zero_point(low, high, candidate)
        return float(criterion(values, candidate.round(values / scale) * scale))

    return max(candidates, key=score)


def _octaves(count: int, tau: int) -> Tensor:
    """``count`` magnitudes ``1, 2^(-1/tau), 2^(-2/tau) ...``, descending."""
    return torch.exp2(-_indices(count) / tau)


def _indices(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64, device="cpu")  # tables are cached: a caller's default device must not stick


@lru_cache(maxsize=4096)
def _log2_table(bits: int, tau: int) -> Tensor:
    magnitudes = _octaves((2**bits - 1) // 2, tau)
    return torch.cat([-magnitudes, magnitudes.new_zeros(1), magnitudes]).float().unique()


@lru_cache(maxsize=4096)
def _log_uniform_table(bits: int, edge: float, tau: int) -> Tensor:
    half = 2 ** (bits - 1)
    small = _octaves((half - 1) // 2, tau) * edge
    large = edge + (1 - edge) * (_indices(half) + 1) / half
    return torch.cat([-small, small.new_zeros(1), small, large]).float().unique()


@lru_cache(maxsize=4096)
def _power_table(bits: int, gamma: float, bottom: float) -> Tensor:
    steps = _indices(2**bits) / (2**bits - 1)
    return (bottom + (1 - bottom) * steps**gamma).float().unique()


@dataclass(frozen=True)
class Log2(LevelFormat):
    """Zero and ``+-2^(-q/tau)``: relative precision is the same everywhere, the largest values are coarse."""

    bits: int
    tau: int = 1

    @property
    def name(self) -> str:
        return f"log2_{self.bits}"

    @property
    def table(self) -> Tensor:
        return _log2_table(self.bits, self.tau)

    def fit(self, values: Tensor, criterion: Criterion) -> NumberFormat:
        return _best([replace(self, tau=tau) for tau in TAUS], values, criterion)


@dataclass(frozen=True)
class LogUniform(LevelFormat):
    """Half of the codes are signed logarithmic up to ``edge``, half are uniform from ``edge`` to 1: small values stay apart, the long
    positive tail is not homogenized. Negative values end at ``-edge``: SiLU features never go far below zero.
    """

    bits: int
    edge: float = 0.25
    tau: int = 2

    @property
    def name(self) -> str:
        return f"log_uniform_{self.bits}"

    @property
    def table(self) -> Tensor:
        return _log_uniform_table(self.bits, self.edge, self.tau)

    def fit(self, values: Tensor, criterion: Criterion) -> NumberFormat:
        magnitude = values.float().abs()
        start = float(magnitude.median() / magnitude.amax().clamp(min=torch.finfo(torch.float32).tiny))
        edges = torch.linspace(min(max(start, 1e-3), 0.9), 0.95, EDGES).tolist()
        return _best([replace(self, edge=edge, tau=tau) for edge in edges for tau in TAUS], values, criterion)


@dataclass(frozen=True)
class Power(LevelFormat):
    """Levels ``bottom + (1 - bottom) * (i / (2^b - 1))^gamma``: dense near the smallest value, one table, no branches."""

    bits: int
    gamma: float = 2.0
    bottom: float = -1.0

    @property
    def name(self) -> str:
        return f"power_{self.bits}"

    @property
    def table(self) -> Tensor:
        return _power_table(self.bits, self.gamma, self.bottom)

    def fit(self, values: Tensor, criterion: Criterion) -> NumberFormat:
        largest = values.float().abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        bottom = min(float(values.float().amin() / largest), 1 - 1e-3)
        return _best([replace(self, gamma=gamma, bottom=bottom) for gamma in GAMMAS], values, criterion)
