"""Steps at which a layer has other bits than it stores: inputs in more or fewer bits or not rounded, weights read in fewer bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from reelquant._remarks import remark
from reelquant._torch_state import stock_torch
from reelquant.clock import FLOAT, OWN, Moment, Widths
from reelquant.formats import Int, parse_format
from reelquant.kernels import Operands, select
from reelquant.nn.layer_view import LayerView
from reelquant.nn.residency import Prepared
from reelquant.nn.runners.branch import with_branches
from reelquant.nn.runners.frame_bands import MixedFrames
from reelquant.nn.runners.kernel import Product
from reelquant.nn.runners.link import CallKind, Chain, Link
from reelquant.nn.spec import LayerLayout


class OtherBits(Link):
    """Computes such steps from the weight as it is stored.

    Inputs in other bits need no second copy of the weight: the kernel multiplies the same memory by other codes. A weight in fewer bits
    is made from the stored one when the bits change, and lives until they change again, beside the stored one.
    """

    @staticmethod
    def wanted(layer: LayerView, kind: CallKind) -> bool:
        return bool(layer.clock) and (_rounds(layer.layout, kind.widths) or _narrows(layer.layout, kind.widths))

    def __call__(self, x: Tensor, moment: Moment, activation: str) -> Tensor:
        layer = self.layer
        chain: Chain = Product(self._runner(moment.widths))
        if layer.layout.bands and not _rounds(layer.layout, moment.widths):  # an input whose bits change is rounded frame by frame
            chain = MixedFrames(layer, chain)
        return with_branches(layer, chain)(x, moment, activation)

    def _runner(self, widths: Widths) -> Any:
        ready = self.layer.prepare()
        if _narrows(self.layer.layout, widths):
            ready = self._narrow(ready, widths.weights)
        if not _rounds(self.layer.layout, widths):
            return ready.runner
        return ready.roundings.get(widths.inputs) or self._rounding(ready, widths)

    @stock_torch()
    def _narrow(self, ready: Prepared, bits: int) -> Prepared:
        if ready.narrow is None or ready.narrow[0] != bits:
            ready.narrow = None  # the old one goes before the new one is made
            operands = self._read_at(ready, bits)
            kernel, refused = self._select(operands)
            if ready.kernel.low_bit and not kernel.low_bit and operands.input is not None:
                remark(f"steps that read weights in {bits} bits are simulated in layers that '{ready.kernel.name}' computes: no integer "
                       f"product takes such weights here")  # fmt: skip
            ready.narrow = bits, Prepared(kernel.prepare(operands), kernel, refused, ready.weight)
        return ready.narrow[1]

    @stock_torch()
    def _rounding(self, ready: Prepared, widths: Widths) -> Any:
        given = self._read_at(self.layer.prepare(), widths.weights) if _narrows(self.layer.layout, widths) else self.layer.operands
        assert given.input is not None
        inputs = None if widths.inputs == FLOAT else given.input.with_bits(widths.inputs)
        if inputs is given.input:
            ready.roundings[widths.inputs] = ready.runner
        elif inputs is not None and hasattr(ready.runner, "rounding"):
            ready.roundings[widths.inputs] = ready.runner.rounding(replace(given, input=inputs))
        else:
            return self._select(other := replace(given, input=inputs))[0].prepare(other)
        return ready.roundings[widths.inputs]

    def _read_at(self, ready: Prepared, bits: int) -> Operands:
        """The layer with its weight in fewer bits. Scales are found once."""
        operands: Operands = self.layer.operands
        weight = operands.weight.narrowed(bits, ready.scales.get(bits))
        ready.scales[bits] = weight.quantizer
        return replace(operands, weight=weight)

    def _select(self, operands: Operands) -> Any:
        return select(operands, self.layer.weight.device.type, self.layer.kernels)


def _rounds(layout: LayerLayout, widths: Widths) -> bool:
    """Whether the input of a layer has other bits."""
    return layout.input is not None and widths.inputs != OWN


def _narrows(layout: LayerLayout, widths: Widths) -> bool:
    """Whether the weight of a layer is read in fewer bits than it has: only integers are."""
    fmt = parse_format(layout.weight.format)
    return widths.weights != OWN and isinstance(fmt, Int) and fmt.bits > widths.weights
