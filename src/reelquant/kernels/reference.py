"""The oracle: what a quantized layer computes, in plain torch and float32, from packed integers and scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from reelquant.kernels.operands import Operands


@dataclass(frozen=True, eq=False)
class Reference:
    """``product(round(rewrite(x)), dequantized weight) + bias``; the weight is dequantized in every call."""

    operands: Operands
    takes: ClassVar = frozenset({"input", "shift", "scale", "rotate", "mix", "window", "input_groups", "scale_codes"})

    def __call__(self, x: Tensor, slot: int | Tensor = 0) -> Tensor:
        given = self.operands
        bias = None if given.bias is None else given.bias.float()
        return given.product(given.quantized_input(given.padded(x), slot), given.weight.dequantize(), bias).to(x.dtype)

    @staticmethod
    def refuses(operands: Operands) -> str | None:
        """None: the reference computes every layer whose features it takes."""
        return None
