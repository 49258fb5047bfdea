"""Spread outliers over all channels of their token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reelquant.kernels import hadamard
from reelquant.transforms.rewrite import GroupView, Rewrite, Transform


@dataclass(frozen=True)
class Rotate(Transform):
    """Multiply the channels by an orthonormal Hadamard matrix, in the input at run time and in the weight once.

    Products of gates are almost sparse: a few tokens reach far beyond the others in a few channels, and a static grid either clips them or
    wastes its levels. After the rotation every channel of such a token carries a share of the outlier.

    Attributes:
        least: rotate a group only where the expected noise falls by this many dB, because a rotation costs run time. Expected is
            the noise of a uniform grid that every channel fills, ``sum_c range_c^2 |W_c|^2``, in the ranges that calibration saw.

    Paper: QuaRot (arXiv 2404.00456), online Hadamard transforms; ViDiT-Q (arXiv 2406.02540) for video. Deviations: never folded into
    neighbouring weights; blocks of the largest power of two that divides the width; no random signs; only where it pays.
    """

    least: float = 0.0
    needs: ClassVar[frozenset[str]] = frozenset({"rotated"})

    def plan(self, group: GroupView) -> Rewrite:
        if group.rotated is None or not group.rounded:
            return Rewrite()
        low, high, _ = group.rotated
        before = _noise(group.low, group.high, group.weights)
        after = _noise(low, high, [hadamard(weight, 1) for weight in group.weights])
        gain = 10 * torch.log10(before / after.clamp(min=torch.finfo(after.dtype).tiny))
        return Rewrite(rotated=True) if float(gain) >= self.least else Rewrite()


def _noise(low: Tensor, high: Tensor, weights: Sequence[Tensor]) -> Tensor:
    width = high.amax(0) - low.amin(0)
    power = torch.stack([weight.movedim(1, 0).flatten(1).square().sum(1) for weight in weights]).sum(0)
    return (width.square() * power).sum()
