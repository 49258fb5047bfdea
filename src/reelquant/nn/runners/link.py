"""The contract of a link in the chain that computes a layer."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from reelquant.clock import AS_STORED, Moment, Widths
from reelquant.kernels.activations import ACTIVATIONS
from reelquant.nn.layer_view import LayerView

Mode = Literal["eager", "compiled", "training"]
"""Who calls: Python, an operator of a compiled graph, or autograd, which wants the gradient of the input."""


class CallKind(NamedTuple):
    """What a chain is made for.

    Attributes:
        mode: who calls.
        widths: bits at the step.
    """

    mode: Mode
    widths: Widths = AS_STORED


Chain = Callable[[Tensor, Moment, str], Tensor]
"""(input, moment, activation) -> output; the activation is a name of :data:`~reelquant.kernels.activations.ACTIVATIONS`, empty for none."""


class Around(ABC):
    """Something around the rest of a chain. It refers to its layer weakly: a cycle would keep the memory of layers that are dropped."""

    def __init__(self, layer: LayerView, inner: Chain) -> None:
        self._layer, self.inner = weakref.ref(layer), inner

    @property
    def layer(self) -> Any:
        """The layer."""
        return self._layer()

    @abstractmethod
    def __call__(self, x: Tensor, moment: Moment, activation: str) -> Tensor:
        """The output of the layer."""


class Link(Around):
    """One thing that a layer does in its forward before the rest of the chain, or instead of it."""

    @staticmethod
    @abstractmethod
    def wanted(layer: LayerView, kind: CallKind) -> bool:
        """Whether the chain of this layer for such calls needs the link."""


def activated(output: Tensor, activation: str) -> Tensor:
    """The output with an activation applied to it."""
    return ACTIVATIONS[activation](output) if activation else output
