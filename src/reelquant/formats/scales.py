"""Numbers that scales may be: floats, or codes of eight bits. A row in :data:`SCALES` says how scales become such numbers.

| name | scale of a unit | stored |
|---|---|---|
| float | the range over the largest number of the format | bfloat16 for channels and groups, else float32 |
| e4m3 | the same, as an e4m3 number times one float32 number for the whole tensor | a byte each, and the float32 number |
| e8m0 | the largest power of two in the range over the largest one in the format | the exponent's byte |

``e4m3`` is NVIDIA's NVFP4 (groups of 16): the number for the tensor puts the largest scale at 448, the end of e4m3.
``e8m0`` is the conversion of the OCP Microscaling Formats (MX) specification 1.0, section 6.3 (groups of 32): what is beyond the largest
number of the format times the scale saturates. e2m1 ends at 6, so magnitudes between 6 and 8 times the scale become 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reelquant._errors import RecipeError
from reelquant.formats.number import MiniFloat, NumberFormat

E4M3 = MiniFloat(4, 3, reserved=1)
SMALLEST = 2.0**-9  # of e4m3 above zero: a group of zeros has this scale, for zero would be divided by
MANTISSA, EXPONENT = 23, 0xFF << 23  # bits of a float32: how many there are below its exponent, and where that is
TINY = torch.finfo(torch.float32).tiny

Rounded = tuple[Tensor, Tensor | None]  # scales [units] float32 as they multiply, and the number for the whole tensor, [1] float32


@dataclass(frozen=True)
class ScaleFormat:
    """How scales are rounded and stored, eight bits each.

    Attributes:
        round: ``(low, high, format) -> (scales, number for the tensor or None)``.
        codes: ``(scales, number for the tensor) -> [units]`` uint8.
        read: ``(codes, number for the tensor) -> scales``, the very floats that were rounded.
        two_levels: whether there is a number for the whole tensor.
    """

    round: Callable[[Tensor, Tensor, NumberFormat], Rounded]
    codes: Callable[[Tensor, Tensor | None], Tensor]
    read: Callable[[Tensor, Tensor | None], Tensor]
    two_levels: bool = False


def _two_levels(low: Tensor, high: Tensor, fmt: NumberFormat) -> Rounded:
    wanted = torch.maximum(high / fmt.high, low / fmt.low) if fmt.low < 0 else high / fmt.high
    whole = (wanted.amax() if len(wanted) else wanted.new_zeros(())) / E4M3.high
    whole = torch.where(whole <= TINY, torch.ones_like(whole), whole).reshape(1)
    return E4M3.round(wanted / whole).clamp(min=SMALLEST) * whole, whole


def _divided(scale: Tensor, whole: Tensor | None) -> Tensor:
    assert whole is not None
    return E4M3.encode(scale / whole)  # exact: two float32 roundings are far less than half a step of e4m3


def _multiplied(codes: Tensor, whole: Tensor | None) -> Tensor:
    assert whole is not None
    return E4M3.decode(codes) * whole.float()


def _power_of_two(low: Tensor, high: Tensor, fmt: NumberFormat) -> Rounded:
    largest = torch.maximum(high, -low)
    scale = (_power_below(largest) / 2.0 ** (math.frexp(fmt.high)[1] - 1)).clamp(min=TINY)
    return torch.where(largest.isnan(), largest, scale), None


def _power_below(values: Tensor) -> Tensor:
    """The largest power of two that is not above each positive number: its bits without the mantissa; inf stays inf."""
    return (values.float().contiguous().view(torch.int32) & EXPONENT).view(torch.float32)


def _exponents(scale: Tensor, whole: Tensor | None) -> Tensor:
    del whole
    return (scale.contiguous().view(torch.int32) >> MANTISSA).to(torch.uint8)


def _powers(codes: Tensor, whole: Tensor | None) -> Tensor:
    del whole
    return (codes.to(torch.int32) << MANTISSA).view(torch.float32)


SCALES: dict[str, ScaleFormat] = {
    "e4m3": ScaleFormat(_two_levels, _divided, _multiplied, two_levels=True),
    "e8m0": ScaleFormat(_power_of_two, _exponents, _powers),
}
FLOAT = "float"


def check_scales(name: str, kind: str) -> None:
    """Refuse unknown names, and scales of eight bits for other units than groups.

    Raises:
        RecipeError: naming what would work.
    """
    if name != FLOAT and name not in SCALES:
        raise RecipeError(f"unknown scale '{name}'; known: {', '.join((FLOAT, *SCALES))}")
    if name != FLOAT and kind != "group":
        raise RecipeError(f"scale: {name} belongs to groups, as in granularity: group-32; got granularity '{kind}'")


def scale_tensors(name: str, scale: Tensor, whole: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Scales as a checkpoint holds them, and the tensors beside them, by what their names add to those of the scales."""
    if name == FLOAT:
        return scale.to(dtype), {}
    return SCALES[name].codes(scale, whole), {} if whole is None else {"_2": whole}


def read_scales(name: str, stored: Tensor, whole: Tensor | None) -> Tensor:
    """Stored scales as float32 numbers, ``[units]``."""
    return stored.float() if name == FLOAT else SCALES[name].read(stored, whole)
