"""While saturation is counted, inputs are looked at before they are rounded."""

from __future__ import annotations

from torch import Tensor

from reelquant.clock import OWN, Moment
from reelquant.nn.layer_view import LayerView
from reelquant.nn.runners.link import CallKind, Link


class CountClipped(Link):
    """Shows every input to the layer's watch; steps with other bits of inputs have other ranges and are left out."""

    @staticmethod
    def wanted(layer: LayerView, kind: CallKind) -> bool:
        return layer.watch is not None and kind.widths.inputs == OWN

    def __call__(self, x: Tensor, moment: Moment, activation: str) -> Tensor:
        self.layer.watch(self.layer, x, moment)
        return self.inner(x, moment, activation)
