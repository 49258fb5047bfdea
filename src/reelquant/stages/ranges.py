"""Quantizers of static inputs from the channel ranges that calibration saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from reelquant.formats import Quantizer, QuantSpec, bind
from reelquant.observe import ChannelRange
from reelquant.stages.rewrite import Rewrite

OVER = {"tensor": [1, 2], "channel": [1], "frame": [2]}
"""Granularity -> the axes of ``[slots, frames, channels]`` that share a scale."""


class Ranges(Protocol):
    """Ranges of raw and of rotated channels: all statistics of an input, or those of one guidance half."""

    @property
    def range(self) -> ChannelRange:
        """Of the raw channels."""
        ...

    @property
    def rotated(self) -> ChannelRange | None:
        """Of the rotated channels, if a stage asked for them."""
        ...


def bound(spec: QuantSpec, rewrite: Rewrite, seen: Ranges, *, unseen: bool, steps: int) -> list[Quantizer]:
    """One quantizer per slot, over the ranges that were seen, moved as ``rewrite`` moves the channels.

    Args:
        unseen: extend the ranges to what later clips may reach.
        steps: number of calibrated steps. With scales per step, a step at which the layer did not run has the scales of the nearest
            step at which it ran; a layer that ran at a single step has one slot.
    """
    channels = seen.rotated if rewrite.rotated else seen.range
    assert channels is not None
    ends = channels.envelope(per_step=spec.slots == "per_step", unseen=unseen)
    low, high = (rewrite.affine(end) for end in ends)
    over = OVER[spec.granularity.kind]
    low = low.amin(over).reshape(len(low), -1).clamp(max=0)
    high = high.amax(over).reshape(len(high), -1).clamp(min=0)
    slots = [bind(spec.format.stored(), spec.granularity, *pair) for pair in zip(low, high, strict=True)]
    return slots if len(slots) == 1 else [slots[row] for row in _nearest(seen.range.seen, steps)]


def _nearest(seen: Sequence[int], steps: int) -> list[int]:
    """For each of ``steps`` steps, the place in ``seen`` of the nearest step; of two, the earlier one."""
    return [min(range(len(seen)), key=lambda place: abs(seen[place] - step)) for step in range(steps)]
