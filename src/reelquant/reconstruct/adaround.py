"""Learned rounding: every weight takes one of two levels, so that the output of a part stays near that in float."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from reelquant._errors import RecipeError
from reelquant.nn import QuantLayer
from reelquant.reconstruct.between import Between, pull, share
from reelquant.reconstruct.soft import SoftLayer
from reelquant.reconstruct.trained import Rated, Trained
from reelquant.stages import LayerWork

SHARPEST, SOFTEST = 2.0, 20.0
"""The last and the first exponent of the regularizer."""


@dataclass(frozen=True)
class AdaRound(Trained):
    """Learn which of the two levels around it every weight takes, by gradients, for all layers of a part at once.

    A weight is ``low + h(v) * (high - low)``, with ``h`` the rectified sigmoid. Adam changes ``v`` and
    minimises the error of the part's output on recorded calls plus ``weight * mean(1 - |2 h - 1| ** beta)``, which
    pushes ``h`` to 0 or 1 while ``beta`` falls. Then every weight takes its nearer level. The other attributes are those of
    :class:`reelquant.reconstruct.trained.Trained`; with ``drop`` this is QDrop, and ``input_rate`` learns scales of inputs along with it.

    More calls pay off together with more iterations: 600 of them on 96 calls, in three times the time, gain 1.6 dB over GPTQ where the
    defaults gain 0.8 (W4A8, 16 clips of a small UNet).

    Attributes:
        weight: of the regularizer. The error counts in units of the error that the part starts with. With few iterations it
            has to be strong: a weight that is undecided when they end is rounded without regard to the error.
        warmup: share of the iterations without the regularizer.

    Papers: AdaRound (arXiv 2004.10568); BRECQ (arXiv 2102.05426): blocks; TFMQ-DM (arXiv 2311.16503): temporal layers; QDrop (arXiv
    2203.05740): ``drop``; Low-bitwidth Floating Point Quantization (arXiv 2408.06995): two neighbours on a grid of floats.
    Deviations: training starts near the codes of the solver (theirs: at the float weight), and a code that is further
    away stays one of the two candidates. Errors are normalised, per tensor by variance and in total by the starting
    error, so that one weight of the regularizer fits all parts. The bias follows the codes as the solver's
    ``correct_bias`` says. There are hundreds of iterations with a larger learning rate (theirs: 20,000 with 0.001).
    BRECQ weights errors by the Fisher information; this stage does not. TFMQ-DM trains all temporal layers as one
    part; here each module is one. BRECQ trains layers outside of blocks one by one; scope ``block`` leaves them.
    """

    weight: float = 300.0
    warmup: float = 0.2
    name: ClassVar[str] = "adaround"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight < 0 or not 0 <= self.warmup < 1:
            raise RecipeError(f"adaround needs weight >= 0 and warmup in [0, 1), got weight={self.weight}, warmup={self.warmup}")

    def weight_of(self, layer: QuantLayer, work: LayerWork, seed: int) -> Between:
        del seed
        return Between(layer, work)

    def rated(self, soft: Sequence[SoftLayer]) -> Sequence[Rated]:
        return [Rated([weight.v for weight in _weights(soft)], self.rate, falls=False)]

    def regularize(self, soft: Sequence[SoftLayer], done: float) -> None:
        if (beta := self.beta(done)) is None:
            return
        weights = [weight.v for weight in _weights(soft)]
        share_of_each = self.weight / sum(v.numel() for v in weights)
        for v in weights:
            gradient = pull(v, beta).mul_(share_of_each)
            v.grad = gradient if v.grad is None else v.grad.add_(gradient)

    def beta(self, done: float) -> float | None:
        """Exponent of the regularizer, which falls linearly; None during the warm-up."""
        if done < self.warmup:
            return None
        return SHARPEST + (SOFTEST - SHARPEST) * (1 - (done - self.warmup) / (1 - self.warmup))


def _weights(soft: Sequence[SoftLayer]) -> Iterator[Between]:
    return (layer.weight for layer in soft if isinstance(layer.weight, Between))


def undecided(soft: Sequence[SoftLayer], beta: float) -> float:
    """Mean of ``1 - |2 h - 1| ** beta`` over the weights of all layers: 0 once each has chosen a level."""
    shares = torch.cat([share(weight.v).flatten() for weight in _weights(soft)])
    return float((1 - (2 * shares - 1).abs().pow(beta)).mean())
