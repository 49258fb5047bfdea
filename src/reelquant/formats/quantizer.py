"""A specification bound to its scales: the only thing solvers and layers touch.

:class:`QuantSpec` says what is wanted (format, granularity, range, slots); :func:`fit` looks at values and returns a
:class:`Quantizer`, which rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from reelquant._errors import RecipeError, UnsupportedError
from reelquant.formats.granularity import Granularity
from reelquant.formats.number import Int, NumberFormat
from reelquant.formats.ranges import MinMax, RangeRule, scale_and_zero_point
from reelquant.formats.scales import FLOAT, SCALES

Slots = Literal["shared", "per_step"]
# Values whose ranges and codes are chosen at a time: a pass over more than the cache holds costs as much as all the arithmetic.
VALUES_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class QuantSpec:
    """What one tensor becomes: ``QuantSpec(Int(8), Granularity("channel"))``.

    Attributes:
        format: the numbers.
        granularity: who shares a scale.
        range: how the range is found.
        slots: ``shared`` by all denoising steps, or one set of scales ``per_step``.
        dynamic: find the range in the forward instead of at calibration (inputs only).
        alternatives: further formats of the same bits; :func:`fit` keeps the one that the range rule's criterion prefers.

    Raises:
        RecipeError: for scales of eight bits of a format with zero points.
    """

    format: NumberFormat = field(default_factory=lambda: Int(8))
    granularity: Granularity = field(default_factory=Granularity)
    range: RangeRule = field(default_factory=MinMax)
    slots: Slots = "shared"
    dynamic: bool = False
    alternatives: tuple[NumberFormat, ...] = ()

    def __post_init__(self) -> None:
        affine = next((fmt.name for fmt in (self.format, *self.alternatives) if fmt.needs_zero_point), None)
        if affine and (scale := self.granularity.scale) != FLOAT:
            raise RecipeError(f"{affine} has zero points, and scale: {scale} has none; use a signed format, as int4 or e2m1")

    def __str__(self) -> str:
        names = "|".join(f.name for f in (self.format, *self.alternatives))
        grain, per_step = self.granularity, self.slots == "per_step"
        told = {f"{grain.scale} scales": grain.scale != FLOAT, "dynamic": self.dynamic, "per step": per_step}
        notes = [str(grain), *(note for note, holds in told.items() if holds)]
        return f"{names} {' '.join(notes)}"


@dataclass(frozen=True, eq=False)
class Quantizer:
    """Rounds tensors onto a format with given scales.

    Attributes:
        format: the numbers.
        granularity: who shares a scale.
        scale: ``[units]`` float32.
        zero_point: ``[units]`` float32 integers, affine formats only.
        whole: ``[1]`` float32, a factor of every scale that is stored once; see :mod:`reelquant.formats.scales`.
    """

    format: NumberFormat
    granularity: Granularity
    scale: Tensor
    zero_point: Tensor | None = None
    whole: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Quantize and dequantize; keeps shape and dtype."""
        blocks, scale = self.granularity.blocks(x), self.scale[:, None]
        zero = None if self.zero_point is None else self.zero_point[:, None]
        unit = blocks.float() / scale  # in place from here on: a new tensor for every step takes twice as long
        number = self.format.round(unit if zero is None else unit.add_(zero))
        rounded = (number if zero is None else number.sub_(zero)).mul_(scale)
        return self.granularity.unblock(rounded.to(x.dtype), x.shape)

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest number that each value of a tensor may become, both float32 in its shape."""
        blocks = self.granularity.blocks(x)
        ends = (self._from_unit(torch.full_like(blocks, end, dtype=torch.float32)) for end in (self.format.low, self.format.high))
        low, high = (self.granularity.unblock(end, x.shape) for end in ends)
        return low, high

    def codes(self, x: Tensor) -> Tensor:
        """Codes of a tensor: uint8 indices in the shape of ``x``."""
        blocks = self._in_parts(self.granularity.blocks(x), torch.uint8, lambda some, units: self.format.encode(self._to_unit(some, units)))
        return self.granularity.unblock(blocks, x.shape)

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of codes, in their shape."""
        blocks = self._in_parts(
            self.granularity.blocks(codes), dtype, lambda some, units: self._from_unit(self.format.decode(some), units).to(dtype)
        )
        return self.granularity.unblock(blocks, codes.shape)

    def _in_parts(self, blocks: Tensor, dtype: torch.dtype, apply: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Treat as many units at a time as stay in the cache."""
        step = max(VALUES_AT_ONCE // max(blocks.shape[1], 1), 1)
        if len(blocks) <= step:
            return apply(blocks, slice(None))
        out = torch.empty(blocks.shape, dtype=dtype, device=blocks.device)
        for start in range(0, len(blocks), step):
            units = slice(start, start + step)
            out[units] = apply(blocks[units], units)
        return out

    def round_columns(self, weight: Tensor, first: int) -> Tensor:
        """Fake-quantize columns ``first ...`` of a weight ``[out, in]``, given as ``[out, width]``, with the scales of their place.

        Column solvers (gptq) round left to right and must meet the very scales the whole matrix has.
        """
        scale = self._columns(self.scale, weight, first)
        zero = None if self.zero_point is None else self._columns(self.zero_point, weight, first)
        unit = weight.float() / scale
        unit = unit if zero is None else unit + zero
        rounded = self.format.round(unit)
        return ((rounded if zero is None else rounded - zero) * scale).to(weight.dtype)

    def _columns(self, values: Tensor, weight: Tensor, first: int) -> Tensor:
        if self.granularity.kind == "group":
            index = torch.arange(first, first + weight.shape[1], device=weight.device) // self.granularity.size
            return values.reshape(weight.shape[0], -1)[:, index]
        if self.granularity.kind in ("tensor", "channel"):
            return values.reshape(-1, 1)
        raise UnsupportedError(f"weights cannot have granularity '{self.granularity}'; use tensor, channel or group-n")

    def _to_unit(self, blocks: Tensor, units: slice = slice(None)) -> Tensor:
        unit = blocks.float() / self.scale[units, None]
        return unit if self.zero_point is None else unit + self.zero_point[units, None]

    def _from_unit(self, unit: Tensor, units: slice = slice(None)) -> Tensor:
        unit = unit if self.zero_point is None else unit - self.zero_point[units, None]
        return unit * self.scale[units, None]


def in_bits(fmt: Int, bits: int, scale: Tensor, zero_point: Tensor | None) -> tuple[Int, Tensor, Tensor | None]:
    """Integers of other bits that cover the same range: format, scale, zero point.

    With more bits every old level is a level: the scale is divided by a power of two, the zero point multiplied by it. With fewer bits the
    zero point is rounded, which moves a range by half of a new step at most.
    """
    other = Int(bits, fmt.signed)
    if zero_point is None:
        return other, scale * max(fmt.low / other.low, fmt.high / other.high), None
    factor = 2.0 ** (fmt.bits - bits) if bits > fmt.bits else fmt.high / other.high
    return other, scale * factor, (zero_point / factor).round()


def bind(fmt: NumberFormat, granularity: Granularity, low: Tensor, high: Tensor) -> Quantizer:
    """The quantizer that covers ``[low, high]`` (each ``[units]``), as far as its scales allow (:mod:`reelquant.formats.scales`)."""
    if granularity.scale != FLOAT:
        scale, whole = SCALES[granularity.scale].round(low.float(), high.float(), fmt)
        return Quantizer(fmt, granularity, scale, whole=whole)
    scale, zero = scale_and_zero_point(low, high, fmt, granularity.scale_dtype)
    return Quantizer(fmt, granularity, scale, zero)


def fit(spec: QuantSpec, values: Tensor) -> Quantizer:
    """Find the format member, the range and the scales that a specification asks for on these values.

    Args:
        spec: what is wanted; ``slots`` is the caller's business.
        values: a weight ``[out, ...]`` or sampled inputs; with a criterion range, features ``[timesteps, dim]``.
    """
    values = values.float()
    criterion = spec.range.criterion()
    candidates = [_fit_one(replace(spec, format=fmt.fit(values, criterion).stored()), values) for fmt in (spec.format, *spec.alternatives)]
    if len(candidates) == 1:
        return candidates[0]
    return max(candidates, key=lambda quantizer: float(criterion(values, quantizer(values))))


def _fit_one(spec: QuantSpec, values: Tensor) -> Quantizer:
    def rounding(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return bind(spec.format, spec.granularity, low, high)(values)

    found = [spec.range.find(part, spec.granularity, rounding) for part in _parts(spec, values)]
    low, high = (torch.cat(ends) for ends in zip(*found, strict=True))
    return bind(spec.format, spec.granularity, low, high)


def _parts(spec: QuantSpec, values: Tensor) -> tuple[Tensor, ...]:
    """Rows whose ranges can be found apart from those of other rows, as many as stay in the cache."""
    grain = spec.granularity
    if spec.range.joint or grain.two_levels or grain.kind not in ("channel", "group") or grain.axis != 0 or not values.numel():
        return (values,)
    return values.split(max(VALUES_AT_ONCE * len(values) // values.numel(), 1))


def dynamic(spec: QuantSpec, x: Tensor) -> Quantizer:
    """The quantizer of this very input: the range rule runs in the forward."""
    return _fit_one(spec, x)
