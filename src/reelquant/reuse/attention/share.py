"""The output of the last computed step stands for that of this one.

Paper: attention sharing across timesteps of DiTFastAttn (arXiv 2406.08552). Ours shares the output of
``scaled_dot_product_attention``; theirs that of the attention layer, so that its projections are not computed either.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reelquant.reuse.attention.mode import Mode, Place


@dataclass(frozen=True)
class Share(Mode):
    """Nothing is computed. Copies are kept and given: a model may write into what attention gives."""

    def attend(self, place: Place) -> Tensor | None:
        output = place.recall(self)
        return output.clone() if place.fits(output) else None

    def keep(self, place: Place, output: Tensor) -> None:
        place.keep(self, output.clone)
