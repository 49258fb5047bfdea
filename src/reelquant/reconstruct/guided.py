"""Errors as guidance makes them count: what both halves of a pair have in common once, what tells them apart many times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from reelquant.clock import BOTH, FIRST, SECOND
from reelquant.formats.criteria import nmse
from reelquant.observe import RecordedCall
from reelquant.reconstruct.error import pairs


def units_of(calls: Sequence[RecordedCall]) -> list[tuple[int, ...]]:
    """Numbers of the calls, those of a guidance pair together: a first half, and the second half of the same step right after it."""
    units: list[tuple[int, ...]] = []
    before: RecordedCall | None = None
    for number, call in enumerate(calls):
        if before is not None and (before.half, call.half, before.step) == (FIRST, SECOND, call.step):
            units[-1] = (number - 1, number)
        else:
            units.append((number,))
        before = call
    return units


def as_one(calls: Sequence[RecordedCall], found: Sequence[Any]) -> tuple[Any, RecordedCall]:
    """What was found for the calls of a unit, and the call that has their outputs: of two halves one that makes both."""
    if len(calls) == 1:
        return found[0], calls[0]
    return _joined(found), replace(calls[0], output=_joined([call.output for call in calls]), half=BOTH)


def _joined(outputs: Sequence[Any]) -> Any:
    return tree_map(lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) and leaves[0].ndim else leaves[0], *outputs)


def guided_error(found: Any, call: RecordedCall, scale: float) -> Tensor:
    """Squared error of an output over the variance of the wanted tensor, as guidance of this scale makes it count: 0-d.

    Guidance makes ``a + scale * (b - a)`` of the halves ``a`` and ``b`` of a pair. With the mean ``m`` and the difference ``d`` of their
    errors, the squared error of that is ``m^2 + (scale - 1/2)^2 d^2``, the mean of both orders; that of the halves by themselves is
    ``m^2 + d^2 / 4``. So ``scale * (scale - 1)`` times the squared difference comes on top, and with a scale of 1 nothing does.

    Args:
        found: what a part gives for the arguments of the call. The halves of a call that makes both are those of the leading axis of its
            tensors; other calls, and tensors of an odd length, have their plain error.
    """
    on_top = scale * (scale - 1) if call.half == BOTH else 0.0
    return torch.stack([_error(one, other, on_top) for one, other in pairs(found, call.output)]).mean()


def _error(found: Tensor, wanted: Tensor, on_top: float) -> Tensor:
    error = nmse(wanted, found)
    if not on_top or wanted.ndim == 0 or len(wanted) % 2:
        return error
    first, second = (found.float() - wanted.float()).chunk(2)
    apart = (second - first).repeat(2, *[1] * (wanted.ndim - 1))
    return error + on_top * nmse(wanted, wanted.float() + apart)
