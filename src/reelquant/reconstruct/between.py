"""A weight between two neighbouring levels, so that gradients can choose one of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reelquant.formats import Quantizer
from reelquant.nn import QuantLayer
from reelquant.reconstruct.levels import Levels
from reelquant.reconstruct.soft import SoftWeight
from reelquant.stages import LayerWork, Solution

STRETCH = 0.1
"""The sigmoid reaches from ``-STRETCH`` to ``1 + STRETCH`` and is clipped to ``[0, 1]``, so that both levels can be
reached."""
MARGIN = 0.4
"""How far the initial share of the upper level is at least from one half, on the side of the starting code. Measured with 300 steps:
a block of a small transformer, rounded to nearest, has an error of 3.1e-3 in calls of unseen captions. It falls to 1.0e-3 from here,
with 0.4 % of the weights undecided in the end (regularizer 300); from the float weight it falls to 2.3e-3, with 2 % undecided, although
the regularizer was stronger (1000). Two small layers that started with gptq gained a tenth from here, and lost from the float weight."""


class Between(SoftWeight):
    """A weight ``low + h(v) * (high - low)`` per element, with ``h`` the rectified sigmoid.

    Attributes:
        lower, upper: codes of the two levels of every element, ``[out, channels * taps]`` uint8.
        low, high: values of the two levels, same shape, float32.
        v: the trained parameter, same shape; zero is the border between the levels.
    """

    def __init__(self, layer: QuantLayer, work: LayerWork) -> None:
        super().__init__()
        packed = layer.packed
        self.quantizer, start = packed.quantizer, packed.unpacked()
        self.lower, self.upper = neighbours(self.quantizer, work.matrix, start)
        self.low, self.high = (self.quantizer.dequantize(codes) for codes in (self.lower, self.upper))
        self.v = nn.Parameter(_initial(work.matrix, self.low, self.high, self.quantizer.dequantize(start) > self.low))

    def values(self, *, hard: bool) -> Tensor:
        if hard:
            return torch.where(self.v.detach() >= 0, self.high, self.low)
        return _Mixed.apply(self.v, self.low, self.high)  # type: ignore[return-value]

    def solution(self) -> Solution:
        return Solution(self.quantizer, torch.where(self.v.detach() >= 0, self.upper, self.lower))


def share(v: Tensor) -> Tensor:
    """Share of the upper level in every element, in ``[0, 1]``: the rectified sigmoid of the parameter. It has no gradient here."""
    return torch.sigmoid(v.detach()).mul_(1 + 2 * STRETCH).sub_(STRETCH).clamp_(0, 1)


class _Mixed(torch.autograd.Function):
    """``low + share(v) * (high - low)``. What lies between is as large as the weight: the way back makes it again, and keeps nothing."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(v, low, high)
        return torch.lerp(low, high, share(v))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        v, low, high = ctx.saved_tensors
        return _slope(_side(v)).mul_(high - low).mul_(grads[0]), None, None


def pull(v: Tensor, beta: float) -> Tensor:
    """Gradient of the sum of ``1 - |2 h - 1| ** beta`` over all elements, with ``h`` the :func:`share`: towards the two levels.

    Written out, because the sum itself is of no interest, and a power with its way back takes longer than a step of training else does.
    """
    side = _side(v.detach())
    grown = side.abs().log_().mul_(beta - 1).exp_()  # zero to a positive power is zero here as well
    return grown.copysign_(side).mul_(_slope(side)).mul_(-2 * beta)


def _side(v: Tensor) -> Tensor:
    """``2 h - 1`` before ``h`` is clipped."""
    return (v / 2).tanh_().mul_(1 + 2 * STRETCH)


def _slope(side: Tensor) -> Tensor:
    """Derivative of the :func:`share`: zero where it is clipped."""
    stretched = 1 + 2 * STRETCH
    return (side / stretched).square_().neg_().add_(1).mul_(stretched / 4).mul_(side.abs() <= 1)


def neighbours(quantizer: Quantizer, target: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the two levels that each element may take, the lower ones first, uint8.

    They are the two around the target, unless the starting code is further away: then it and its neighbour towards
    the target. A target beyond the last level gets the last two levels.

    Args:
        target: ``[out, in]`` float32.
        start: codes ``[out, in]`` uint8.
    """
    levels, nearest = Levels(quantizer.format), quantizer.codes(target)
    begun = levels.places(start)
    low = levels.places(nearest) - (quantizer.dequantize(nearest) > target).long()
    low = low.minimum(begun).maximum(begun - 1).clamp(0, levels.last - 1)
    return levels.codes(low), levels.codes(low + 1)


def _initial(target: Tensor, low: Tensor, high: Tensor, upper: Tensor) -> Tensor:
    """``v`` whose soft weight is the target, moved towards the starting code until it is :data:`MARGIN` on its side."""
    share = ((target - low) / (high - low).clamp(min=torch.finfo(low.dtype).tiny)).clamp(0, 1)
    share = torch.where(upper, share.clamp(min=0.5 + MARGIN), share.clamp(max=0.5 - MARGIN))
    return torch.logit((share + STRETCH) / (1 + 2 * STRETCH))
