"""Random dropping of rounding: some of a layer's inputs stay float while weights are learned (QDrop, arXiv 2203.05740)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from reelquant.observe import RecordedCall


class Drop:
    """Leaves a share of values unrounded, others in every call, in an order that the seed decides."""

    def __init__(self, share: float, seed: int) -> None:
        self.share, self._generator = share, torch.Generator().manual_seed(seed)

    def __call__(self, rounded: Tensor, unrounded: Tensor) -> Tensor:
        """Values of the first tensor, and a share of them of the second one."""
        if not self.share:
            return rounded
        kept = torch.rand(rounded.shape, generator=self._generator).to(rounded.device)
        return torch.where(kept < self.share, unrounded, rounded)

    def call(self, rounded: RecordedCall, unrounded: RecordedCall) -> RecordedCall:
        """The first call, with a share of the numbers of its arguments from the second one."""
        first, spec = tree_flatten((rounded.args, dict(rounded.kwargs)))
        second, _ = tree_flatten((unrounded.args, dict(unrounded.kwargs)))
        pairs = zip(first, second, strict=True)
        args, kwargs = tree_unflatten([self(one, other) if _numbers(one) else one for one, other in pairs], spec)
        return replace(rounded, args=args, kwargs=kwargs)


def _numbers(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
