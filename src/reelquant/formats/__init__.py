"""Number formats, granularities, ranges, and the quantizer that combines them. Everything works on tensors; code that knows layers does
not belong here."""

from __future__ import annotations

from collections.abc import Callable

from reelquant._errors import RecipeError, nearest
from reelquant.formats.granularity import FOUND_AT_RUN_TIME, Granularity, parse_granularity
from reelquant.formats.kept import NOTHING, Kept
from reelquant.formats.leading import Leading
from reelquant.formats.number import LEVEL_DTYPE, Criterion, Int, LevelFormat, Levels, MiniFloat, NumberFormat
from reelquant.formats.packing import pack, packed_width, unpack
from reelquant.formats.quantizer import Quantizer, QuantSpec, bind, dynamic, fit, in_bits
from reelquant.formats.ranges import CRITERIA, RANGES, ByCriterion, FourOverSix, MinMax, Mse, Percentile, RangeRule
from reelquant.formats.scales import SCALES, read_scales, scale_tensors
from reelquant.formats.skewed import Log2, LogUniform, Power

__all__ = [
    "CRITERIA",
    "FORMATS",
    "FOUND_AT_RUN_TIME",
    "LEVEL_DTYPE",
    "NOTHING",
    "RANGES",
    "SCALES",
    "ByCriterion",
    "Criterion",
    "FourOverSix",
    "Granularity",
    "Int",
    "Kept",
    "Leading",
    "LevelFormat",
    "Levels",
    "Log2",
    "LogUniform",
    "MinMax",
    "MiniFloat",
    "Mse",
    "NumberFormat",
    "Percentile",
    "Power",
    "QuantSpec",
    "Quantizer",
    "RangeRule",
    "bind",
    "dynamic",
    "fit",
    "in_bits",
    "pack",
    "packed_width",
    "parse_format",
    "parse_granularity",
    "read_scales",
    "register_format",
    "scale_tensors",
    "unpack",
]

# Families that take a bit width are listed once per width, so that every name a recipe can use is greppable in `reelquant recipes`.
FORMATS: dict[str, Callable[[], NumberFormat]] = {
    **{f"int{bits}": (lambda bits=bits: Int(bits)) for bits in range(2, 9)},
    **{f"uint{bits}": (lambda bits=bits: Int(bits, signed=False)) for bits in range(2, 9)},
    "e4m3": lambda: MiniFloat(4, 3, reserved=1),
    "e5m2": lambda: MiniFloat(5, 2, reserved=4),
    "e3m4": lambda: MiniFloat(3, 4, reserved=16),
    "e3m2": lambda: MiniFloat(3, 2),
    "e2m3": lambda: MiniFloat(2, 3),
    "e2m1": lambda: MiniFloat(2, 1),
    "e3m0": lambda: MiniFloat(3, 0),
    "e1m2": lambda: MiniFloat(1, 2),
    **{f"log2_{bits}": (lambda bits=bits: Log2(bits)) for bits in range(2, 9)},
    **{f"log_uniform_{bits}": (lambda bits=bits: LogUniform(bits)) for bits in range(3, 9)},
    **{f"power_{bits}": (lambda bits=bits: Power(bits)) for bits in range(2, 9)},
}


def parse_format(name: str) -> NumberFormat:
    """The format a recipe names: ``int8`` (symmetric), ``uint8`` (affine), ``e4m3``, ``log_uniform_6`` ...

    Raises:
        RecipeError: with the nearest known name.
    """
    if name not in FORMATS:
        raise RecipeError(f"unknown number format '{name}'; {nearest(name, FORMATS)}")
    return FORMATS[name]()


def register_format(name: str, make: Callable[[], NumberFormat]) -> None:
    """Add a format under a new name (plug-ins). Raises :class:`RecipeError` if the name is taken."""
    if name in FORMATS:
        raise RecipeError(f"number format '{name}' exists already; choose another name")
    FORMATS[name] = make
