"""Formats of weights as they are written, ``FORMAT/GRANULARITY``, and the bytes that they take."""

from __future__ import annotations

import math
from typing import NamedTuple

from reelquant._errors import RecipeError
from reelquant.formats import Granularity, NumberFormat, parse_format, parse_granularity

GRAINS = ("tensor", "channel", "group")


class WeightNumbers(NamedTuple):
    """What ``int4/group-64`` says of a weight."""

    format: NumberFormat
    granularity: Granularity


def check_weight(written: str, where: str) -> WeightNumbers:
    """Read a weight's format.

    Args:
        where: what the text stands in, for the message.

    Raises:
        RecipeError: if it is not written so, or no weight can have it.
    """
    fmt, slash, grain = str(written).partition("/")
    if not slash:
        raise RecipeError(f"{where} are written FORMAT/GRANULARITY, as in int4/group-64; got {written!r}")
    granularity = parse_granularity(grain)
    if granularity.kind not in GRAINS:
        raise RecipeError(f"a weight has no {granularity.kind}s; {where} take {', '.join(GRAINS[:-1])} or group-n, got {written!r}")
    return WeightNumbers(parse_format(fmt), granularity)


def weight_bytes(written: str, shape: tuple[int, ...]) -> int:
    """Bytes of the codes and scales of a weight ``shape`` in a format like ``int4/group-64``; the bias is not counted."""
    numbers = check_weight(written, "formats")
    codes = shape[0] * -(-math.prod(shape[1:]) * numbers.format.bits // 8)
    grain = numbers.granularity
    return int(codes + grain.units(shape) * grain.scale_dtype.itemsize + 4 * grain.two_levels)


def weight_bits(written: str) -> float:
    """Bits of a code: what formats are ordered by."""
    return float(check_weight(written, "formats").format.bits)
