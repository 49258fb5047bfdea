"""While saturation is counted, inputs are looked at before they are rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from reelquant.clock import Moment
from reelquant.nn.runners.link import Link, Mode

if TYPE_CHECKING:
    from reelquant.nn.layers import QuantLayer


class CountClipped(Link):
    """Shows every input to the layer's watch; protected steps have other ranges and are left out."""

    @staticmethod
    def wanted(layer: QuantLayer, mode: Mode) -> bool:
        return layer.watch is not None

    def __call__(self, x: Tensor, moment: Moment, activation: str) -> Tensor:
        if not moment.protected:
            self.layer.watch(self.layer, x, moment)
        return self.inner(x, moment, activation)
