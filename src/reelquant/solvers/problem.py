"""What a solver is asked and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from reelquant.formats import Quantizer, QuantSpec


@dataclass(frozen=True, eq=False)
class Problem:
    """Find codes for one weight.

    Attributes:
        weight: ``[out, in]`` float32, transforms already in; convolutions flattened.
        spec: the format, granularity and range wanted.
        covariance: ``[in, in]`` of the (transformed) input, centred, or None for data-free solvers.
        factor: gives :func:`reelquant.observe.inverse_factor` of the covariance for a damping and an order of its columns, from a
            cache; None: it is computed.
    """

    weight: Tensor
    spec: QuantSpec
    covariance: Tensor | None = None
    factor: Callable[[float, Tensor], Tensor] | None = None

    def objective(self, quantized: Tensor) -> float:
        """Mean squared output error that no bias can repair: ``tr(E C E^T) / out``; plain squared error without data."""
        error = quantized - self.weight
        if self.covariance is None:
            return float(error.square().sum(1).mean())
        return float(((error @ self.covariance) * error).sum() / len(error))


@dataclass(frozen=True, eq=False)
class Solution:
    """Codes for one weight.

    Attributes:
        quantizer: format and scales.
        codes: ``[out, in]`` uint8.
        replaced: name of the solver that was given up for ``nearest``, or None.
    """

    quantizer: Quantizer
    codes: Tensor
    replaced: str | None = None

    @property
    def values(self) -> Tensor:
        """The weight as these codes have it, ``[out, in]`` float32."""
        return self.quantizer.dequantize(self.codes)


class Solver(ABC):
    """Chooses codes. ``needs`` names the statistics it wants."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def supports(self, spec: QuantSpec) -> str | None:
        """Why this solver cannot handle a spec, or None. Asked before calibration."""
        del spec
        return None

    @abstractmethod
    def solve(self, problem: Problem) -> Solution: ...
