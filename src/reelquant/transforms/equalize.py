"""Move ranges between the weights of two layers that follow each other, so that one scale for a whole weight serves all of its channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from reelquant._errors import RecipeError
from reelquant.sites import Group
from reelquant.stages import ModelWork, Stage

REACH = 8
"""Largest exponent of a factor in one round: channels that are nearly dead stay in the range of half precision."""


class Pair(NamedTuple):
    """A channel of the first module's output is a channel of what the second ones read.

    Attributes:
        first: a layer, or an affine norm.
        rows: the output channels of it that count.
        second: the layers that read them.
    """

    first: nn.Module
    rows: slice
    second: Sequence[nn.Module]


@dataclass(frozen=True)
class Equalize(Stage):
    """Divide output channels of a layer and multiply the input channels of its readers, until both have the same largest weights.

    With ``r1`` the largest magnitude of an output channel's weights and ``r2`` that of the readers' weights of this channel, the factor is
    ``sqrt(r1 / r2)``, rounded to a power of two: no number of the float model is rounded, so its output changes by nothing but the order
    of sums. Pairs are those that discovery saw (:attr:`reelquant.sites.Group.source`): values and output projection of attention, the
    ungated half of a feed-forward and its second layer; and affine norms before layers (:attr:`reelquant.sites.Group.foldable`), whose
    ``gamma`` counts as the weight of a layer with one number per channel. Where an activation stands between, there is no pair. The
    weights of the float model are changed in place, so nothing is left to store or to compute.

    Attributes:
        rounds: how often all pairs are gone through: a layer may be in two pairs.
        norms: whether norms count as first layers.

    Paper: DFQ (arXiv 1906.04721), section 4.1, cross-layer equalization. Deviations: factors are powers of two; pairs are those of
    transformers (theirs: convolutions around a ReLU, with batch norms folded into them); biases of norms are not absorbed (section 4.1.3),
    and biases are not corrected here: theirs takes means of inputs from batch norms. With calibration a solver's ``correct_bias`` does it.
    An adapter (LoRA) on a first layer of a pair meets other channels than those it was trained with: merge it before quantizing.
    """

    rounds: int = 3
    norms: bool = True
    samples: ClassVar[bool] = False
    in_memory: ClassVar[str | None] = "equalize changes two float layers at once"

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise RecipeError(f"equalize takes rounds of 1 or more, got {self.rounds}")

    def before_observing(self, work: ModelWork) -> None:
        pairs = self.pairs(work)
        if not pairs:
            work.warnings.append(
                "equalize changed nothing: between the layers it touches an activation or another reader stands everywhere"
            )
        for _ in range(self.rounds):
            for pair in pairs:
                scale = factors(pair)
                move(pair, scale)
                work.undo(lambda pair=pair, scale=scale: move(pair, 1 / scale))

    def pairs(self, work: ModelWork) -> list[Pair]:
        """All pairs whose layers the stage touches, in execution order."""
        touched = set(work.touched(self))
        found = []
        for group in work.map.groups:
            name = _first(group, touched, norms=self.norms)
            if name is None or not touched.issuperset(group.layers):
                continue
            second = [work.denoiser.get_submodule(layer) for layer in group.layers]
            width = work.map.layers[group.name].shape[1]
            found.append(Pair(work.denoiser.get_submodule(name), slice(group.source_row, group.source_row + width), second))
        return found


def _first(group: Group, touched: set[str], *, norms: bool) -> str | None:
    if group.source is not None:
        return group.source if group.source in touched else None
    return group.producer if norms and group.foldable else None


def factors(pair: Pair) -> Tensor:
    """A power of two for every channel ``[channels]`` float32; one where a channel has no weights at all."""
    first = _weight(pair.first)[pair.rows].float().flatten(1).abs().amax(1)
    second = torch.stack([_weight(layer).float().movedim(1, 0).flatten(1).abs().amax(1) for layer in pair.second]).amax(0)
    exponent = ((first / second).log2() / 2).round().clamp(-REACH, REACH)
    return torch.where((first > 0) & (second > 0), exponent, torch.zeros_like(exponent)).exp2()


@torch.no_grad()
def move(pair: Pair, scale: Tensor) -> None:
    """Divide the channels of the first module by ``scale`` ``[channels]``, and multiply those of the second ones."""
    for parameter in (pair.first.weight, pair.first.bias if isinstance(getattr(pair.first, "bias", None), Tensor) else None):
        if isinstance(parameter, Tensor):
            rows = parameter[pair.rows]
            rows.div_(scale.to(rows).view(-1, *[1] * (rows.ndim - 1)))
    for layer in pair.second:
        weight = _weight(layer)
        weight.mul_(scale.to(weight).view(1, -1, *[1] * (weight.ndim - 2)))


def _weight(module: nn.Module) -> Tensor:
    """``[out, in, *kernel]`` of a layer, ``[channels, 1]`` of a norm: the parameter's own memory."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach() if weight.ndim > 1 else weight.detach().unsqueeze(1)
