"""Layers whose frames are mixed: the mix before the product, its opposite behind it."""

from __future__ import annotations

from torch import Tensor

from reelquant.clock import Moment
from reelquant.kernels import FrameBands
from reelquant.nn.layer_view import LayerView
from reelquant.nn.runners.link import CallKind, Link, activated


class MixedFrames(Link):
    """Mixes frames, rounds each band to its bits, computes the product, and undoes the mix; the bias stays the same in every frame."""

    @staticmethod
    def wanted(layer: LayerView, kind: CallKind) -> bool:
        del kind
        return bool(layer.layout.bands)

    def __call__(self, x: Tensor, moment: Moment, activation: str) -> Tensor:
        layer, bands = self.layer, FrameBands.read(self.layer.layout.bands)
        axis = -1 if layer.window is None else 1
        if not bands.mixes(x):
            return self.inner(bands.rounded(x, axis), moment, activation)
        output = bands.frames(self.inner(bands.rounded(bands.bands(x), axis), moment, ""))
        if layer.bias is not None:
            bias = layer.bias.to(output) if layer.window is None else layer.bias.to(output).view(-1, *[1] * (output.ndim - 2))
            output = output + bands.arrangement.spread(1 - bands.of_constant(), output) * bias
        return activated(output, activation)
