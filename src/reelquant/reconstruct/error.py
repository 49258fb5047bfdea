"""How far the output of a part is from that of the float model, and which recorded calls train and which decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from reelquant.formats.criteria import nmse
from reelquant.observe import RecordedCall
from reelquant.stages import BlockWork

HELD_OUT = 4
"""One of so many recorded calls is held out: it decides whether better codes are used."""


def split(count: int) -> tuple[list[int], list[int]]:
    """Numbers of the calls to train on, and of those that are held out, of so many; the last call is held out."""
    held_out = list(range(count - 1, -1, -HELD_OUT))
    return sorted(set(range(count)) - set(held_out)), held_out


def output_error(found: Any, wanted: Any) -> Tensor:
    """Mean over the tensors of two outputs of squared error over the variance of the wanted tensor: 0-d."""
    pairs = zip(_tensors(found), _tensors(wanted), strict=True)
    return torch.stack([nmse(other, one) for one, other in pairs]).mean()


def _tensors(output: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())


@torch.no_grad()
def mean_error(block: BlockWork, calls: Sequence[RecordedCall], numbers: Sequence[int]) -> float:
    """Mean error of a block over the calls with these numbers."""
    errors = [output_error(block.output(calls[number]), calls[number].output) for number in numbers]
    return float(torch.stack(errors).mean())
