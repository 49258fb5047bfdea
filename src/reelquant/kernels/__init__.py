"""Which function computes a quantized layer. The reference path in plain torch always exists and is the oracle of all others.

Issue 3 of the plan fills this table with fast kernels; today every row resolves to ``reference`` and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from reelquant.kernels.hadamard import block_size, hadamard
from reelquant.kernels.reference import InputStage, PackedWeight, reference

KernelFunction = Callable[[Tensor, InputStage, PackedWeight, Tensor | None, Callable[..., Tensor]], Tensor]
KERNELS: dict[tuple[str, str | None, str], tuple[str, KernelFunction]] = {}


@dataclass(frozen=True)
class Kernel:
    """A function and the name that reports print. ``simulated``: its arithmetic is float although the storage is low-bit."""

    name: str
    function: KernelFunction
    simulated: bool


def select(weight_format: str, input_format: str | None, device: str) -> Kernel:
    """The kernel for this pair of formats on this device type."""
    if (found := KERNELS.get((weight_format, input_format, device))) is not None:
        return Kernel(*found, simulated=False)
    return Kernel("reference", reference, simulated=True)


__all__ = ["KERNELS", "InputStage", "Kernel", "PackedWeight", "block_size", "hadamard", "reference", "select"]
