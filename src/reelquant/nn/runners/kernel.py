"""The end of every chain: the quantized product, by the kernel that was prepared for the layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reelquant.clock import Moment
from reelquant.kernels.activations import ACTIVATIONS
from reelquant.nn.residency import Residency


class KernelProduct:
    """The product of the kernel that the residency holds; prepared in the first call, and again when the weight has moved."""

    def __init__(self, residency: Residency) -> None:
        self.residency = residency

    def __call__(self, x: Tensor, moment: Moment, activation: str) -> Tensor:
        return product(self.residency.prepare().runner, x, moment, activation)


class Product:
    """The product of a given runner."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def __call__(self, x: Tensor, moment: Moment, activation: str) -> Tensor:
        return product(self.runner, x, moment, activation)


def product(runner: Any, x: Tensor, moment: Moment, activation: str) -> Tensor:
    """Product and activation, in one kernel if it fuses them."""
    row = moment.slot if moment.row is None else moment.row
    if not activation:
        return runner(x, row)
    if activation in getattr(runner, "fused", ()):
        return runner(x, row, activation)
    return ACTIVATIONS[activation](runner(x, row))
