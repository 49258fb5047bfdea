"""Number formats: which numbers exist. Pure tensor maths on *units*, that is on values already divided by their scale.

Three families share one contract (:class:`NumberFormat`): integers, small floats, and any sorted table of levels. A code is always an
index ``0 .. 2**bits - 1``; what it stands for is the format's business, how it is packed is :mod:`reelquant.formats.packing`'s.

``round`` passes NaN on, so that it shows. ``encode`` has no code for NaN and returns an arbitrary code that fits the bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from reelquant._errors import RecipeError

Criterion = Callable[[Tensor, Tensor], Tensor]  # (float values, dequantized values) -> score, larger is better


class NumberFormat(ABC):
    """A finite set of numbers and the rounding onto it.

    Attributes:
        bits: bits per code.
        low, high: the smallest and largest number, in units.
        needs_zero_point: True if the numbers are ``0 .. 2**bits - 1`` and only an integer zero point makes negatives (affine integers).
    """

    bits: int
    needs_zero_point: bool = False

    @property
    @abstractmethod
    def name(self) -> str:
        """The name recipes and config files use."""

    @property
    @abstractmethod
    def low(self) -> float: ...

    @property
    @abstractmethod
    def high(self) -> float: ...

    @abstractmethod
    def encode(self, unit: Tensor) -> Tensor:
        """Nearest code of every unit value, as ``uint8`` indices; values outside ``[low, high]`` saturate."""

    @abstractmethod
    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Unit value of every code."""

    def round(self, unit: Tensor) -> Tensor:
        """Encode and decode in one go, in the dtype of ``unit``; NaN stays NaN."""
        return torch.where(unit.isnan(), unit, self.decode(self.encode(unit), unit.dtype))

    def levels(self) -> Tensor:
        """All distinct numbers, sorted: ``[<= 2**bits]`` float32."""
        return self.decode(torch.arange(2**self.bits, dtype=torch.uint8)).unique()

    def fit(self, values: Tensor, criterion: Criterion) -> NumberFormat:
        """The member of this family that suits ``values`` best; a family of one returns itself."""
        del values, criterion
        return self

    def stored(self) -> NumberFormat:
        """The format as a checkpoint holds it: codes must be chosen with exactly the numbers that come back."""
        return self

    @property
    def table(self) -> Tensor | None:
        """Sorted levels that have to be stored with the layer, or None for formats that a name describes completely."""
        return None


@dataclass(frozen=True)
class Int(NumberFormat):
    """Evenly spaced integers: signed ``-2^(b-1) .. 2^(b-1)-1`` (``int8``) or affine ``0 .. 2^b-1`` with a zero point (``uint8``)."""

    bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"an integer format has 2 to 8 bits, got {self.bits}")

    @property
    def needs_zero_point(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.signed

    @property
    def name(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    @property
    def low(self) -> float:
        return float(-(2 ** (self.bits - 1))) if self.signed else 0.0

    @property
    def high(self) -> float:
        return self.low + 2**self.bits - 1

    def encode(self, unit: Tensor) -> Tensor:
        return unit.round().clamp(self.low, self.high).sub_(self.low).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return codes.to(dtype).add_(self.low)

    def round(self, unit: Tensor) -> Tensor:
        return unit.round().clamp(self.low, self.high)


POWER = 0x7F800000
"""Where a float32 has its exponent. Without the other bits it is a power of two; ``torch.frexp`` and ``exp2`` take four times as long."""


@dataclass(frozen=True)
class MiniFloat(NumberFormat):
    """A float of ``1 + exponent + mantissa`` bits with subnormals and without infinities.

    | name | bits | largest | smallest above 0 | source |
    |---|---|---|---|---|
    | e4m3 | 8 | 448 | 2^-9 | OCP 8-bit floating point; without NaN |
    | e5m2 | 8 | 57344 | 2^-16 | OCP 8-bit floating point; without infinity and NaN |
    | e3m4 | 8 | 15.5 | 2^-6 | ``float8_e3m4`` of ml_dtypes, IEEE 754 in small; without infinity and NaN |
    | e3m2 | 6 | 28 | 2^-4 | OCP Microscaling 1.0; every code is a number |
    | e2m3 | 6 | 7.5 | 2^-3 | OCP Microscaling 1.0; every code is a number |
    | e2m1 | 4 | 6 | 2^-1 | OCP Microscaling 1.0; every code is a number |
    | e3m0 | 4 | 16 | 2^-2 | ours: zero and powers of two |
    | e1m2 | 4 | 3.5 | 2^-1 | ours: evenly spaced, sign and magnitude |

    Round to nearest, ties to even, saturating: the conversion of current hardware. Between powers of two (e3m0) ties go away from zero.
    Codes are the bit patterns of the hardware, the sign on top.
    """

    exponent: int
    mantissa: int
    reserved: int = 0  # codes of the largest magnitudes that mean infinity or NaN in the source: never given

    @property
    def bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 1 + self.exponent + self.mantissa

    @property
    def name(self) -> str:
        return f"e{self.exponent}m{self.mantissa}"

    @property
    def high(self) -> float:
        return float(_magnitudes(self.exponent, self.mantissa, self.reserved)[-1])

    @property
    def low(self) -> float:
        return -self.high

    def round(self, unit: Tensor) -> Tensor:
        bias = 2 ** (self.exponent - 1) - 1
        value = unit.float().clamp(self.low, self.high)
        power = (value.detach().view(torch.int32) & POWER).view(torch.float32)  # of two, the largest one that is not above the magnitude
        step = power.clamp_(min=2.0 ** (1 - bias)).mul_(2.0**-self.mantissa)
        return value.div(step).round_().mul_(step).to(unit.dtype)

    def encode(self, unit: Tensor) -> Tensor:
        value = self.round(unit.float())
        magnitudes = _magnitudes(self.exponent, self.mantissa, self.reserved).to(value.device)
        index = torch.searchsorted(magnitudes, value.abs().contiguous()).clamp_(max=len(magnitudes) - 1)  # NaN has no index
        return (index + torch.signbit(value) * 2 ** (self.bits - 1)).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        half = 2 ** (self.bits - 1)
        magnitudes = _magnitudes(self.exponent, self.mantissa, self.reserved).to(codes.device)
        index = (codes.long() % half).clamp(max=len(magnitudes) - 1)  # reserved codes never come out of encode
        value = magnitudes[index]
        return torch.where(codes >= half, -value, value).to(dtype)


@lru_cache(maxsize=16)
def _magnitudes(exponent: int, mantissa: int, reserved: int) -> Tensor:
    """The non-negative numbers of a small float, ascending: their index is their bit pattern."""
    bias, steps = 2 ** (exponent - 1) - 1, 2**mantissa
    values = [
        (index % steps) / steps * 2.0 ** (1 - bias) if index < steps else (1 + index % steps / steps) * 2.0 ** (index // steps - bias)
        for index in range(2 ** (exponent + mantissa) - reserved)
    ]
    return torch.tensor(values, dtype=torch.float32, device="cpu")  # cached: a caller's default dtype or device must not last


LEVEL_DTYPE = torch.float16  # of stored level tables: levels lie in [-1, 1]


class LevelFormat(NumberFormat):
    """Base of formats given by a sorted table of at most ``2**bits`` levels; rounding goes to the nearest level (linear midpoint)."""

    @property
    @abstractmethod
    def table(self) -> Tensor:
        """Sorted distinct levels, float32."""

    @property
    def low(self) -> float:
        return float(self.table[0])

    @property
    def high(self) -> float:
        return float(self.table[-1])

    def stored(self) -> NumberFormat:
        return Levels(self.table.to(LEVEL_DTYPE).float().unique(), self.bits, self.name)

    def encode(self, unit: Tensor) -> Tensor:
        table = self.table.to(unit.device)
        midpoints = (table[1:] + table[:-1]) / 2
        return torch.bucketize(unit.float().contiguous(), midpoints).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        table = self.table.to(codes.device)
        return table[codes.long().clamp(max=len(table) - 1)].to(dtype)


@dataclass(frozen=True, eq=False)
class Levels(LevelFormat):
    """Levels read from a tensor: what a fitted format becomes once it is stored in a checkpoint."""

    values: Tensor
    bits: int = 8
    name: str = "levels"  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():  # a layer's own table, checked when it was built or loaded
            return
        if self.values.ndim != 1 or not 2 <= len(self.values) <= 2**self.bits or bool((self.values.diff() <= 0).any()):
            raise RecipeError(
                f"a level table is a sorted vector of 2 to {2**self.bits} distinct values, got shape {tuple(self.values.shape)}"
            )

    @property
    def table(self) -> Tensor:
        return self.values
