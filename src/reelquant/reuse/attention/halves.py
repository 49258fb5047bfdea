"""One half of a guidance pair is computed, and stands for both.

Paper: attention sharing across classifier-free guidance of DiTFastAttn (arXiv 2406.08552), also together with its windows. Where both
halves come in one call, ours computes the second one, which has the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reelquant.nn import AttentionCall
from reelquant.reuse.attention.mode import Mode, Place, check_share
from reelquant.reuse.attention.window import keep_far, near_and_far


@dataclass(frozen=True)
class Halves(Mode):
    """Guidance in one call: its second half. In two calls: the first one. Without guidance, nothing is saved.

    Attributes:
        window: below 1 that half is computed as mode ``window`` does.
    """

    window: float = 1.0

    def __post_init__(self) -> None:
        check_share("halves", "window", self.window)

    def attend(self, place: Place) -> Tensor | None:
        if place.half > 1:
            return None
        if place.half == 1:
            given = place.take(self)
            return given.clone() if place.fits(given) else None
        if not place.twice or len(place.call.query) % 2:
            output = self._computed(place, place.call, 0)
            if output is not None:
                place.give(self, output.clone())
            return output
        half = len(place.call.query) // 2
        output = self._computed(place, _behind(place.call, half), half)
        return None if output is None else torch.cat([output, output])

    def _computed(self, place: Place, call: AttentionCall, start: int) -> Tensor | None:
        return place.compute(call) if self.window == 1 else near_and_far(place, call, self.window, start)

    def keep(self, place: Place, output: Tensor) -> None:
        if not place.half and self.window < 1:
            keep_far(place, output, self.window)


def _behind(call: AttentionCall, start: int) -> AttentionCall:
    """The same for the items of the batch from ``start`` on."""
    query, key, value, scale, mask = call
    return AttentionCall(query[start:], key[start:], value[start:], scale, mask if mask is None or len(mask) == 1 else mask[start:])
