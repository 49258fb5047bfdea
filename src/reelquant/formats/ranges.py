"""How a range is found: from values to ``(low, high)``, each ``[units]``, one row of ``granularity.blocks`` being one unit.

Every range includes zero: a padded position, a dead channel and a sparse tensor must keep an exact zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reelquant._errors import RecipeError, nearest
from reelquant.formats import criteria
from reelquant.formats.granularity import Granularity
from reelquant.formats.number import NumberFormat

Rounding = Callable[[Tensor, Tensor, Tensor], Tensor]  # (values, low, high) -> dequantized values


class RangeRule(ABC):
    """Finds the part of the number line that the codes cover.

    Attributes:
        needs_samples: whether minimum and maximum alone are not enough.
        joint: whether the range of a unit depends on other units.
        covers_all: whether the range is that of the smallest and the largest value, which kernels can find in the forward.
    """

    needs_samples: bool = False
    joint: bool = False
    covers_all: bool = False

    @abstractmethod
    def find(self, values: Tensor, granularity: Granularity, rounding: Rounding) -> tuple[Tensor, Tensor]:
        """Ranges ``(low, high)``, each ``[units]``, of ``values``; ``rounding`` quantizes the values for a trial range."""

    def criterion(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The score by which the best of several formats is chosen with this rule."""
        return CRITERIA["nmse"]


def bounds(values: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every unit, zero included; no values at all range from zero to zero."""
    blocks = granularity.blocks(values)
    if not blocks.shape[1]:
        return blocks.new_zeros(len(blocks)), blocks.new_zeros(len(blocks))
    return blocks.amin(1).clamp(max=0), blocks.amax(1).clamp(min=0)


@dataclass(frozen=True)
class MinMax(RangeRule):
    """The whole range: nothing is clipped, but for the rounding of a group's bfloat16 scale (at most 1/256 of the range)."""

    covers_all = True

    def find(self, values: Tensor, granularity: Granularity, rounding: Rounding) -> tuple[Tensor, Tensor]:
        return bounds(values, granularity)


@dataclass(frozen=True)
class Percentile(RangeRule):
    """Leave out the outermost ``1 - percentile`` of the values on each side.

    Attributes:
        percentile: in (0.5, 1].
    """

    percentile: float = 0.999
    needs_samples = True

    def __post_init__(self) -> None:
        if not 0.5 < self.percentile <= 1:
            raise RecipeError(f"percentile lies in (0.5, 1], got {self.percentile}")

    def find(self, values: Tensor, granularity: Granularity, rounding: Rounding) -> tuple[Tensor, Tensor]:
        if not values.numel():
            return bounds(values, granularity)
        ordered = granularity.blocks(values).float().sort(1).values  # torch.quantile refuses more than 16 million values
        last = ordered.shape[1] - 1
        low, high = ordered[:, round((1 - self.percentile) * last)], ordered[:, round(self.percentile * last)]
        return low.clamp(max=0), high.clamp(min=0)


def _check_factors(candidates: int, smallest: float, largest: float = 1.0) -> None:
    if not 1 <= candidates <= 10_000:
        raise RecipeError(f"candidates counts the factors that are tried, 1 to 10000, got {candidates}")
    if not 0 < smallest <= 1:
        raise RecipeError(f"smallest is the last factor of the range, in (0, 1], got {smallest}")
    if not 1 <= largest <= 2:
        raise RecipeError(f"largest is the first factor of the range, in [1, 2], got {largest}")


@dataclass(frozen=True)
class Mse(RangeRule):
    """Shrink both ends by a common factor; keep the factor with the least ``sum |x - q(x)|^p``.

    Paper: QVD's port searches 50 symmetric candidates with p = 2.4; BRECQ and Q-Diffusion 80 candidates. Ours are ``candidates`` factors
    evenly from ``largest`` down to ``smallest``.

    Factors above 1 leave codes at the ends unused; see :class:`FourOverSix` for why that may pay.

    Attributes:
        p: power of the error.
        candidates: how many factors are tried.
        smallest: the least of them.
        largest: the largest of them, from 1 to 2.
    """

    p: float = 2.4
    candidates: int = 50
    smallest: float = 0.3
    largest: float = 1.0
    needs_samples = True

    def __post_init__(self) -> None:
        _check_factors(self.candidates, self.smallest, self.largest)

    def find(self, values: Tensor, granularity: Granularity, rounding: Rounding) -> tuple[Tensor, Tensor]:
        values = values.float()  # the error of a bfloat16 result would drown in its own rounding
        low, high = bounds(values, granularity)
        best, factor = torch.full_like(low, torch.inf, dtype=torch.float32), torch.ones_like(low)
        for trial in torch.linspace(self.largest, self.smallest, self.candidates, dtype=torch.float32).tolist():
            error = rounding(values, low * trial, high * trial) - values
            loss = granularity.blocks(error).abs().float().pow(self.p).sum(1)
            factor = torch.where(loss < best, torch.full_like(factor, trial), factor)
            best = torch.minimum(best, loss)
        return low * factor, high * factor


@dataclass(frozen=True)
class FourOverSix(Mse):
    """Let the largest value of each unit become 6 or 4, the last numbers of e2m1, whichever has the smaller squared error.

    The numbers of e2m1 lie wide apart at the end: 3, 4, 6. A unit whose large values lie between 4 and 6 loses less where its range is
    half as large again, so that they lie between 2.7 and 4. Of no use for numbers that are evenly spaced.

    Source: four over six (arXiv 2512.02010). Deviation: its number for the whole tensor leaves room for the larger scales (it puts the
    largest at 256 in the place of 448, the end of e4m3); ours is found from the ranges that were chosen.
    """

    p: float = 2.0
    candidates: int = 2
    smallest: float = 1.0
    largest: float = 1.5


@dataclass(frozen=True)
class ByCriterion(RangeRule):
    """Shrink both ends by the factor that maximises a criterion of all values at once (for features ``[timesteps, dim]``).

    Attributes:
        score: name of the criterion.
        candidates: how many factors are tried, evenly from 1 down to ``smallest``.
        smallest: the least of them.
    """

    score: str = "tdscore"
    candidates: int = 25
    smallest: float = 0.4
    needs_samples = True
    joint = True

    def __post_init__(self) -> None:
        if self.score not in CRITERIA:
            raise RecipeError(f"unknown criterion '{self.score}'; {nearest(self.score, CRITERIA)}")
        _check_factors(self.candidates, self.smallest)

    def criterion(self) -> Callable[[Tensor, Tensor], Tensor]:
        return CRITERIA[self.score]

    def find(self, values: Tensor, granularity: Granularity, rounding: Rounding) -> tuple[Tensor, Tensor]:
        values = values.float()
        low, high = bounds(values, granularity)
        score = self.criterion()
        trials = torch.linspace(1, self.smallest, self.candidates, dtype=torch.float32).tolist()
        best = max(trials, key=lambda trial: float(score(values, rounding(values, low * trial, high * trial))))
        return low * best, high * best


CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tdscore": criteria.temporal_objective,
    "nmse": criteria.negative_nmse,
}
RANGES: dict[str, type[RangeRule]] = {
    "minmax": MinMax,
    "percentile": Percentile,
    "mse": Mse,
    "four_over_six": FourOverSix,
    "criterion": ByCriterion,
}


def scale_and_zero_point(low: Tensor, high: Tensor, fmt: NumberFormat, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    """Scale ``[units]`` (float32, positive) and integer zero point ``[units]`` (affine formats only) that cover ``[low, high]``.

    A range of zero width gets scale 1, so that a constant zero stays exact; NaN stays NaN, so that it shows. The scale is rounded to
    ``dtype``, the one it is stored in.
    """
    low, high, span = low.float(), high.float(), fmt.high - fmt.low
    if fmt.needs_zero_point:
        scale = _positive(high / span - low / span, dtype)  # not (high - low) / span: that can overflow
        return scale, (-low / scale).round().clamp(fmt.low, fmt.high)
    upper = high / fmt.high
    scale = torch.maximum(upper, low / fmt.low) if fmt.low < 0 else upper
    return _positive(scale, dtype), None


def _positive(scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(scale <= torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale).to(dtype).float()
