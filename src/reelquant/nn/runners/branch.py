"""Branches of a layer: a share of the output that is computed beside the quantized product, from tensors of their own."""

from __future__ import annotations

from torch import Tensor

from reelquant.branches import Branch
from reelquant.clock import Moment
from reelquant.nn.layer_view import LayerView
from reelquant.nn.runners.link import Around, CallKind, Chain, Link, activated


class Branched(Link):
    """All branches of a layer around the rest of the chain; the activation follows the sum."""

    def __init__(self, layer: LayerView, inner: Chain) -> None:
        super().__init__(layer, with_branches(layer, inner))

    @staticmethod
    def wanted(layer: LayerView, kind: CallKind) -> bool:
        return bool(layer.layout.branches)

    def __call__(self, x: Tensor, moment: Moment, activation: str) -> Tensor:
        return self.inner(x, moment, activation)


def with_branches(layer: LayerView, inner: Chain) -> Chain:
    """The chain with the branches of a layer around it, the first of the layout outermost."""
    for branch in reversed(layer.layout.branches):
        inner = OneBranch(layer, branch, inner)
    return inner


class OneBranch(Around):
    """One branch around a chain. Its tensors are looked up in every call: offloading moves them."""

    def __init__(self, layer: LayerView, branch: Branch, inner: Chain) -> None:
        super().__init__(layer, inner)
        self.branch = branch

    def __call__(self, x: Tensor, moment: Moment, activation: str) -> Tensor:
        layer = self.layer
        tensors = layer.branch_tensors(self.branch)
        output = self.branch.run(lambda given: self.inner(given, moment, ""), x, moment, tensors, layer.window)
        return activated(output, activation)
