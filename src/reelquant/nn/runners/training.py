"""The gradient of a layer between adapters that are trained: that of its float weight, as if the input were not rounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reelquant.clock import Moment
from reelquant.nn.layer_view import LayerView
from reelquant.nn.runners.link import CallKind, Chain, Link, activated


class StraightThrough(Link):
    """Computes the output with the rest of the chain and the gradient with :meth:`QuantLayer.input_gradient`."""

    @staticmethod
    def wanted(layer: LayerView, kind: CallKind) -> bool:
        return kind.mode == "training"

    def __call__(self, x: Tensor, moment: Moment, activation: str) -> Tensor:
        return activated(_Function.apply(x, self.layer, self.inner, moment), activation)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, inner: Chain, moment: Moment) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return inner(x.detach(), moment, "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.layer.input_gradient(gradient, ctx.shape), None, None, None
