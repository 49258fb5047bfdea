"""Give the two halves of a concatenated input ranges of their own, where a skip connection of a UNet comes in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reelquant.kernels import Scaling
from reelquant.stages import GroupView, Rewrite, magnitude
from reelquant.transforms.transform import Transform


@dataclass(frozen=True)
class Split(Transform):
    """Divide the channels before the seam by one number and those behind it by another, so that both halves fill the range of the input.

    One scale then serves the whole input, and one product the whole layer. Inputs without a seam, and inputs whose channels a rotation or a
    permutation has mixed already, stay as they are.

    Paper: Q-Diffusion (arXiv 2302.04304), section 4.2, shortcut-splitting quantization. Deviations: the halves of the input alone have
    scales of their own (theirs: those of the weight, too); the numbers follow from the extremes of all steps; the layer is computed at
    once (theirs: two products).
    """

    def plan(self, group: GroupView) -> Rewrite:
        seam, mixed = group.seam, any(not isinstance(mix, Scaling) for mix in group.total.mixes)
        if seam is None or mixed or not group.rounded:
            return Rewrite()
        largest = magnitude(group)
        first, second = float(largest[:seam].amax()), float(largest[seam:].amax())
        if min(first, second) <= 0:
            return Rewrite()
        ratio = (first / second) ** 0.5
        scale = torch.full_like(largest, 1 / ratio)
        scale[:seam] = ratio
        return Rewrite(scale=scale)
