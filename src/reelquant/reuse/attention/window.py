"""Attention to near tokens only, plus what far ones gave at the last computed step.

Paper: window attention with residual sharing of DiTFastAttn (arXiv 2406.08552). Ours has windows of a share of all tokens, so that one
recipe serves all sizes (theirs: 50 to 512 tokens), which move with every few queries instead of every one: products of slices save
multiplications everywhere, without a kernel of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reelquant.nn import AttentionCall
from reelquant.reuse.attention.mode import Mode, Place, check_share

STRIDES = 4
"""A window moves by this part of its length. The queries at the ends of a stride still see 3/8 of it to the one side."""


@dataclass(frozen=True)
class Window(Mode):
    """Every query sees the keys around it; the difference that all keys made at the last computed step is added.

    Attributes:
        window: the share of the keys that a query sees, which is also the share of the multiplications. Tokens are near where their numbers
            are: those of a video come picture by picture, row by row.
    """

    window: float = 0.25

    def __post_init__(self) -> None:
        check_share("window", "window", self.window)

    def attend(self, place: Place) -> Tensor | None:
        return near_and_far(place, place.call, self.window)

    def keep(self, place: Place, output: Tensor) -> None:
        keep_far(place, output, self.window)


def keep_far(place: Place, output: Tensor, window: float) -> None:
    """Keep what the keys outside of the windows change in an output; nothing of attention to other tokens than its own."""
    queries, keys = place.call.query.shape[2], place.call.key.shape[2]
    if queries == keys and _width(keys, window) < keys:
        place.keep(("far", window), lambda: output - windowed(place, place.call, window))


def near_and_far(place: Place, call: AttentionCall, window: float, start: int = 0) -> Tensor | None:
    """Attention of every query to its window, and what was kept of the rest; None if nothing was.

    Args:
        call: that of the place, or its items from ``start`` on.
    """
    far = place.recall(("far", window))
    return windowed(place, call, window) + far[start:] if place.fits(far) else None


def windowed(place: Place, call: AttentionCall, window: float) -> Tensor:
    """Attention of every query to its window: ``[batch, heads, queries, head]``."""
    tokens = call.query.shape[2]
    width = _width(tokens, window)
    size = math.ceil(width / STRIDES)
    parts = []
    for start in range(0, tokens, size):
        end = min(start + size, tokens)
        first = min(max((start + end - width) // 2, 0), tokens - width)
        seen = slice(first, first + width)
        rows = slice(start, end)
        mask = None if call.mask is None else call.mask[:, :, rows if call.over_pairs else slice(None), seen]
        part = AttentionCall(call.query[:, :, rows], call.key[:, :, seen], call.value[:, :, seen], call.scale, mask)
        given = place.compute(part)
        parts.append(given if mask is None else given.masked_fill(_unseen(mask), 0))  # softmax of nothing is NaN
    return torch.cat(parts, 2)


def _unseen(mask: Tensor) -> Tensor:
    """Where a query sees no key at all: ``[1 or batch, 1 or heads, 1 or queries, 1]``."""
    return (mask.isneginf() if mask.is_floating_point() else ~mask).all(-1, keepdim=True)


def _width(tokens: int, window: float) -> int:
    return max(round(window * tokens), 1)
