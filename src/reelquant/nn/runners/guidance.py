"""Layers whose input scales differ between the two halves of a guidance pair compute one half after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.clock import ANY, BOTH, FIRST, SECOND, Moment
from reelquant.nn.layer_view import LayerView
from reelquant.nn.runners.link import CallKind, Link
from reelquant.nn.spec import HALVES


class GuidanceHalves(Link):
    """Chooses the row of input scales by step and half; a batch that holds both halves is computed in two parts."""

    @staticmethod
    def wanted(layer: LayerView, kind: CallKind) -> bool:
        return layer.layout.cfg_halves

    def __call__(self, x: Tensor, moment: Moment, activation: str) -> Tensor:
        first = (moment.slot if self.layer.layout.slots > HALVES else 0) * HALVES
        if moment.half != BOTH or len(x) % 2:
            half = ANY if moment.half == BOTH else moment.half
            return self.inner(x, moment._replace(row=first + half), activation)
        parts = zip((FIRST, SECOND), x.chunk(2), strict=True)
        return torch.cat([self.inner(part, moment._replace(row=first + half), activation) for half, part in parts])
