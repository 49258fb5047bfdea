"""Quantizers of static inputs from the channel ranges that calibration saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from reelquant._errors import UnsupportedError
from reelquant.formats import Quantizer, QuantSpec, bind
from reelquant.kernels import Rotation
from reelquant.observe import ChannelRange
from reelquant.stages.rewrite import Rewrite, is_plain

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


def follows(rewrite: Rewrite, seen: Ranges) -> tuple[ChannelRange, Rewrite] | None:
    """The observed ranges that those of the rewritten input follow from, and the rest of the rewrite; None if there are none.

    The range of a rotated channel does not follow from the ranges of channels. Observed is the rotation of the raw input in its largest
    blocks, and no other.
    """
    channels, rest = seen.range, rewrite
    if seen.rotated is not None and rewrite.mixes and is_plain(rewrite.mixes[0]):
        channels, rest = seen.rotated, replace(rewrite, mixes=rewrite.mixes[1:])
    return None if any(isinstance(mix, Rotation) for mix in rest.mixes) else (channels, rest)


def ends(rewrite: Rewrite, seen: Ranges, *, per_step: bool, unseen: bool) -> tuple[Tensor, Tensor] | None:
    """Ranges of the rewritten channels, ``[slots, frames, channels]`` each; None if they do not follow from what was observed."""
    found = follows(rewrite, seen)
    if found is None:
        return None
    channels, rest = found
    return rest.ends(*channels.envelope(per_step=per_step, unseen=unseen))


def bound(spec: QuantSpec, rewrite: Rewrite, seen: Ranges, *, unseen: bool, steps: int) -> list[Quantizer]:
    """One quantizer per slot, over the ranges that were seen, moved as ``rewrite`` moves the channels.

    Args:
        unseen: extend the ranges to what later clips may reach.
        steps: number of calibrated steps. With scales per step, a step at which the layer did not run has the scales of the nearest
            step at which it ran; a layer that ran at a single step has one slot.

    Raises:
        UnsupportedError: if the ranges of the rewritten input do not follow from the observed ones.
    """
    found = ends(rewrite, seen, per_step=spec.slots == "per_step", unseen=unseen)
    if found is None:
        raise UnsupportedError(f"no ranges are observed of an input that is rotated after other rewrites, got {spec}; use dynamic: true")
    over = OVER[spec.granularity.kind]
    low, high = found
    low = low.amin(over).reshape(len(low), -1).clamp(max=0)
    high = high.amax(over).reshape(len(high), -1).clamp(min=0)
    slots = [bind(spec.format.stored(), spec.granularity, *pair) for pair in zip(low, high, strict=True)]
    return slots if len(slots) == 1 else [slots[place] for place in nearest_seen(seen.range.seen, steps)]


def nearest_seen(seen: Sequence[int], steps: int) -> list[int]:
    """For each of ``steps`` steps, the place in ``seen`` of the nearest step; of two, the earlier one."""
    return [min(range(len(seen)), key=lambda place: abs(seen[place] - step)) for step in range(steps)]
