"""A stored weight in the number type of another format: its very codes where the type can hold them, else rounded again."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from reelquant.branches import branch_name
from reelquant.checkpoint.export.source import Facts, Layer
from reelquant.formats import Granularity, Int, MinMax, NumberFormat, Quantizer, QuantSpec, RangeRule, fit, parse_format


@dataclass(frozen=True)
class NumberType:
    """Numbers that a format of another project can hold.

    Attributes:
        name: what the user calls it.
        format: the numbers.
        granularity: who shares a scale: ``tensor``, ``channel`` (a row) or ``group-n`` (n weights of a row).
        range: how a weight is rounded whose codes do not fit.
        together: weights of a row that must share a scale for codes to be kept; 0 for those of ``granularity``.
    """

    name: str
    format: NumberFormat
    granularity: Granularity
    range: RangeRule = field(default_factory=MinMax)
    together: int = 0

    def refuses(self, facts: Facts) -> str | None:
        """Why the codes of a layer cannot be kept, or None if they can."""
        layout = facts.layout
        if layout.rotate or layout.scale or layout.mix:
            return f"the input's {'rotation' if layout.rotate else 'scale' if layout.scale else 'mixing'} is folded into the weight"
        if layout.branches:
            return f"the branch '{branch_name(layout.branches[0])}' is folded into the weight"
        if not self._holds(parse_format(layout.weight.format)) or layout.weight.levels:
            return f"{layout.weight.format} numbers do not fit {self.name}"
        if not self._divides(layout.weight.grain(), facts.shape):
            return f"a scale per {layout.weight.granularity} is finer than {self.name} has them"
        return None

    def _holds(self, given: NumberFormat) -> bool:
        if isinstance(self.format, Int):
            return isinstance(given, Int) and given.bits <= self.format.bits and (given.signed or not self.format.signed)
        return given == self.format

    def _divides(self, given: Granularity, shape: tuple[int, ...]) -> bool:
        """Whether every unit of this type lies within one unit of the stored weight."""
        own, width = self.granularity, torch.Size(shape[1:]).numel()
        if own.kind == "tensor" or given.kind == "tensor":
            return given.kind == "tensor"
        members = self.together or own.size or width
        return width % members == 0 and (given.kind == "channel" or given.size % members == 0 or given.size >= width)

    def encode(self, layer: Layer, facts: Facts) -> tuple[Tensor, Quantizer]:
        """Codes ``[out, width]`` (uint8, indices into the format's numbers) and the quantizer that reads them."""
        if self.refuses(facts) is None:
            return self._kept(layer)
        weight = layer.weight.flatten(1)
        quantizer = fit(QuantSpec(self.format, self.granularity, self.range), weight)
        return quantizer.codes(weight), quantizer

    def _kept(self, layer: Layer) -> tuple[Tensor, Quantizer]:
        packed = layer.quant.packed
        codes, given = packed.unpacked(), packed.quantizer
        zero = given.zero_point
        if isinstance(self.format, Int):  # the same integers, counted from another lowest one
            codes = codes + int(given.format.low - self.format.low) if self.format.signed else codes
            if not self.format.signed and zero is None:
                zero = torch.full_like(given.scale, -given.format.low)
        scale, zero = (None if v is None else self._spread(v, given.granularity, codes.shape) for v in (given.scale, zero))
        assert scale is not None
        return codes.to(torch.uint8), Quantizer(self.format, self.granularity, scale, zero)

    def _spread(self, values: Tensor, given: Granularity, shape: torch.Size) -> Tensor:
        """Values of the stored units, one for every unit of this type."""
        if self.granularity.kind == "tensor":
            return values
        rows, width = shape
        members = self.granularity.size or width
        of_row = values.expand(rows).reshape(rows, 1) if given.kind == "tensor" else values.reshape(rows, -1)
        stored = given.size if given.kind == "group" else width
        return of_row[:, torch.arange(0, width, members) // stored].flatten()


def added_error(layer: Layer, values: Tensor) -> float:
    """Squared difference over the squared weight: 0 if the reader sees the very numbers of the artifact."""
    weight = layer.weight.flatten(1)
    return float((values.float().reshape_as(weight) - weight).norm() / weight.norm().clamp(min=1e-30)) ** 2
