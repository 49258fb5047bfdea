"""Weights are looked at before anything runs: one NaN makes every clip black, and is blamed on whatever meets it first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._errors import CalibrationError

PIECE = 2**24  # numbers that are looked at at once
MASK = "mask"  # tensors with this in their name may hold infinities


def check_finite(components: Any) -> None:
    """Look at every float tensor of the modules among some components; those on the meta device are passed over.

    Args:
        components: parts of a pipeline by name.

    Raises:
        CalibrationError: naming the component, the layer and the tensor.
    """
    for name, part in components.items():
        if isinstance(part, nn.Module):
            tensors = {key: value for key, value in part.state_dict().items() if isinstance(value, Tensor)}
            check_tensors(name, tensors, tensors.__getitem__)


def check_tensors(component: str, names: Iterable[str], load: Callable[[str], Tensor]) -> None:
    """The same for the tensors of one component, one in memory at a time.

    Raises:
        CalibrationError: as :func:`check_finite`.
    """
    for name in names:
        value = load(name)
        if value.is_meta or not value.is_floating_point() or (finite(value) if MASK not in name else not _holds_nan(value)):
            continue
        layer, _, tensor = name.rpartition(".")
        where = f"layer '{layer}' of '{component}'" if layer else f"'{component}'"
        raise CalibrationError(f"the {tensor} of {where} holds NaN or inf; the checkpoint is damaged or overflowed in float16")


def finite(value: Tensor) -> bool:
    """Whether all numbers of a float tensor are."""
    return all(bool(_wide(piece).isfinite().all()) for piece in value.detach().flatten().split(PIECE))


def _holds_nan(value: Tensor) -> bool:
    return any(bool(_wide(piece).isnan().any()) for piece in value.detach().flatten().split(PIECE))


def _wide(value: Tensor) -> Tensor:
    """Formats of eight bits are for storage: torch cannot look at them."""
    return value if value.element_size() > 1 else value.to(torch.float16)
