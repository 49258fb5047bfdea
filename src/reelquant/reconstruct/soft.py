"""Quantized layers whose weights lie between two neighbouring levels, so that gradients can choose one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from reelquant.clock import Moment
from reelquant.formats import NumberFormat, Quantizer
from reelquant.kernels import InputQuant
from reelquant.nn import QuantLayer, get_module, set_module
from reelquant.nn.runners.branch import with_branches
from reelquant.nn.runners.guidance import GuidanceHalves
from reelquant.stages import BlockWork, LayerWork, Solution

STRETCH = 0.1
"""The sigmoid reaches from ``-STRETCH`` to ``1 + STRETCH`` and is clipped to ``[0, 1]``, so that both levels can be
reached."""
MARGIN = 0.4
"""How far the initial share of the upper level is at least from one half, on the side of the starting code. Measured with 300 steps:
a block of a small transformer, rounded to nearest, has an error of 3.1e-3 in calls of unseen captions. It falls to 1.0e-3 from here,
with 0.4 % of the weights undecided in the end (regularizer 300); from the float weight it falls to 2.3e-3, with 2 % undecided, although
the regularizer was stronger (1000). Two small layers that started with gptq gained a tenth from here, and lost from the float weight."""


class SoftLayer(nn.Module):
    """Stands for a quantized layer, with a weight ``low + h(v) * (high - low)`` per element.

    Everything else is that of the layer: the rewrite of its input (none if a norm has taken it over), the rounding of
    its input at the current denoising step, branches. The bias follows the weight by
    :meth:`reelquant.stages.LayerWork.bias_for`. Rounding of the input has the gradient of the identity.

    Attributes:
        layer: the quantized layer.
        work: what it was made of.
        lower: codes of the lower level of every element, ``[out, channels * taps]`` uint8.
        low, high: values of the two levels, same shape, float32.
        v: the trained parameter, same shape; zero is the border between the levels.
        hard: whether every element takes the level that it is nearer to; then the output is that of the reference
            kernel.
    """

    def __init__(self, layer: QuantLayer, work: LayerWork) -> None:
        super().__init__()
        self.layer, self.work, self.hard = layer, work, True
        packed = layer.packed
        self.quantizer, start = packed.quantizer, packed.unpacked()
        self.lower = lower_codes(self.quantizer, work.matrix, start)
        self.low, self.high = (self.quantizer.dequantize(self.lower + above) for above in (0, 1))
        self.v = nn.Parameter(_initial(work.matrix, self.low, self.high, start > self.lower))

    def forward(self, input: Tensor) -> Tensor:
        clock = self.layer.clock
        chain = with_branches(self.layer, self._product)
        if self.layer.layout.cfg_halves:
            chain = GuidanceHalves(self.layer, chain)
        return chain(input, clock[0].now() if clock else Moment(), "")

    def _product(self, x: Tensor, moment: Moment, activation: str) -> Tensor:
        """Product of the rounded input with the weight as it is now; ``activation`` is always empty here."""
        operands = self.layer.operands
        rewritten, inputs = operands.rewritten_input(operands.padded(x)), self._input_quant(moment)
        if inputs is not None:
            value, row = rewritten.detach(), moment.slot if moment.row is None else moment.row
            rewritten = inputs.quantizer(value, row)(value) + (rewritten - value)
        values = self.values()
        return operands.product(rewritten, values.reshape(self.layer.weight_shape), self._bias(values)).to(x.dtype)

    def _input_quant(self, moment: Moment) -> InputQuant | None:
        """How the input is rounded at this step; protected steps round more finely or not at all."""
        inputs = self.layer.operands.input
        if inputs is None or not moment.protected:
            return inputs
        return None if self.layer.clock[0].inputs == "float" else inputs.widened()

    def _bias(self, values: Tensor) -> Tensor | None:
        """The bias as the layer would store it, float32."""
        bias, stored = self.work.bias_for(values), self.layer.bias
        return None if bias is None or stored is None else bias.to(stored.dtype).float()

    @property
    def share(self) -> Tensor:
        """Share of the upper level in every element, in ``[0, 1]``."""
        return (torch.sigmoid(self.v) * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)

    def values(self) -> Tensor:
        """The weight as it is now, ``[out, channels * taps]`` float32."""
        if self.hard:
            return torch.where(self.v.detach() >= 0, self.high, self.low)
        return self.low + self.share * (self.high - self.low)

    def harden(self) -> Solution:
        """The codes of the nearer levels."""
        return Solution(self.quantizer, self.lower + (self.v.detach() >= 0).to(torch.uint8))


def ordered(number_format: NumberFormat) -> bool:
    """Whether larger codes of a format are larger numbers, so that the next code is the neighbouring level."""
    values = number_format.decode(torch.arange(2**number_format.bits, dtype=torch.uint8))
    return bool((values.diff() >= 0).all())


def lower_codes(quantizer: Quantizer, target: Tensor, start: Tensor) -> Tensor:
    """Codes of the lower of the two levels that each element may take, uint8.

    They are the two around the target, unless the starting code is further away: then it and its neighbour towards
    the target. A target beyond the last level gets the last two levels.

    Args:
        target: ``[out, in]`` float32.
        start: codes ``[out, in]`` uint8.
    """
    nearest, start = quantizer.codes(target).short(), start.short()
    low = nearest - (quantizer.dequantize(nearest.to(torch.uint8)) > target).short()
    low = low.minimum(start).maximum(start - 1)
    return low.clamp(0, len(quantizer.format.levels()) - 2).to(torch.uint8)


def _initial(target: Tensor, low: Tensor, high: Tensor, upper: Tensor) -> Tensor:
    """``v`` whose soft weight is the target, moved towards the starting code until it is :data:`MARGIN` on its side."""
    share = ((target - low) / (high - low).clamp(min=torch.finfo(low.dtype).tiny)).clamp(0, 1)
    share = torch.where(upper, share.clamp(min=0.5 + MARGIN), share.clamp(max=0.5 - MARGIN))
    return torch.logit((share + STRETCH) / (1 + 2 * STRETCH))


def soften(block: BlockWork) -> tuple[BlockWork, Mapping[str, SoftLayer]]:
    """The block with soft layers in the places of the layers that may change, and these by path. Only they can be
    trained.

    The module of ``block`` is changed, except where it is the layer itself.
    """
    block.module.requires_grad_(False)
    soft = {path: SoftLayer(_layer(block.module, path), work) for path, work in block.layers.items()}
    if "" in soft:
        return replace(block, module=soft[""]), soft
    for path, layer in soft.items():
        set_module(block.module, path, layer)
    return block, soft


def _layer(module: nn.Module, path: str) -> QuantLayer:
    layer = get_module(module, path)
    assert isinstance(layer, QuantLayer), "the engine puts quantized layers into the module of a block"
    return layer
