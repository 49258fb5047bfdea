"""Protected steps: inputs are not rounded, or integers of fewer bits are rounded to eight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from reelquant._torch_state import stock_torch
from reelquant.clock import Moment
from reelquant.kernels import Operands, select
from reelquant.nn.layer_view import LayerView
from reelquant.nn.runners.branch import with_branches
from reelquant.nn.runners.kernel import Product
from reelquant.nn.runners.link import CallKind, Link


class ProtectedSteps(Link):
    """Computes protected steps with another kernel, from the weight as it is: no second copy of the weight outlives the call."""

    @staticmethod
    def wanted(layer: LayerView, kind: CallKind) -> bool:
        return kind.protected and layer.layout.input is not None and bool(layer.clock)

    def __call__(self, x: Tensor, moment: Moment, activation: str) -> Tensor:
        return with_branches(self.layer, Product(self._runner()))(x, moment, activation)

    def _runner(self) -> Any:
        layer = self.layer
        ready, operands = layer.prepare(), layer.operands
        inputs, wanted = operands.input, layer.clock[0].inputs
        finer = None if wanted == "float" else inputs.widened()
        if finer is not None and (ready.finer is not None or finer is inputs):
            return ready.finer or ready.runner
        return self._prepare(ready, replace(operands, input=finer))

    @stock_torch()
    def _prepare(self, ready: Any, given: Operands) -> Any:
        if given.input is not None and hasattr(ready.runner, "rounding"):
            ready.finer = ready.runner.rounding(given)
            return ready.finer
        return select(given, self.layer.weight.device.type, self.layer.kernels)[0].prepare(given)
