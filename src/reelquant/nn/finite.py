"""Broken weights are found before anything runs; later they would be blamed on what runs into them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from reelquant._errors import CalibrationError
from reelquant.nn.narrow import widened

MASK = "mask"  # tensors with this in their name may hold infinities


def is_finite(value: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor inf; makes no copy of it, but for floats of one byte."""
    return bool(_ends(value).isfinite().all())


def _ends(value: Tensor) -> Tensor:
    """Smallest and largest number, both NaN if there is one; empty for what holds no floats or lies on the meta device."""
    if not value.is_floating_point() or not value.numel() or value.is_meta:
        return torch.empty(0)
    return torch.stack(widened(value.detach()).aminmax())


def check_finite(component: str, model: nn.Module) -> None:
    """Look at every parameter and buffer of a component of a pipeline; what is on the meta device is passed over.

    Raises:
        CalibrationError: naming the first that is not finite.
    """
    for path, module in model.named_modules():
        kept = {name: value for name, value in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set}
        for name, value in (dict(module.named_parameters(recurse=False)) | kept).items():
            _check(value, name, path or type(module).__name__, component)


def check_tensors(component: str, names: Iterable[str], load: Callable[[str], Tensor]) -> None:
    """The same for stored tensors, one in memory at a time.

    Args:
        component: what they belong to.
        names: of the tensors.
        load: reads one of them.

    Raises:
        CalibrationError: as :func:`check_finite`.
    """
    for name in names:
        layer, _, tensor = name.rpartition(".")
        _check(load(name), tensor, layer, component)


def _check(value: Tensor, name: str, layer: str, component: str) -> None:
    ends = _ends(value)
    if bool(ends.isnan().any()) or (MASK not in name and bool(ends.isinf().any())):
        raise CalibrationError(broken(name, layer, f" of '{component}'"))


def broken(tensor: str, layer: str, where: str = "") -> str:
    """What is said of a float tensor that is not finite."""
    owner = f" of layer '{layer}'" if layer else ""
    return f"the {tensor}{owner}{where} holds NaN or inf; the checkpoint is damaged or overflowed in float16"
