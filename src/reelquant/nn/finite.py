"""Broken weights are found before anything runs; later they would be blamed on what runs into them."""

from __future__ import annotations

from torch import Tensor, nn

from reelquant._errors import CalibrationError
from reelquant.nn.narrow import widened


def is_finite(value: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor inf; makes no copy of it, but for floats of one byte."""
    if not value.is_floating_point() or not value.numel() or value.is_meta:
        return True
    low, high = widened(value.detach()).aminmax()
    return bool(low.isfinite() & high.isfinite())


def check_finite(component: str, model: nn.Module) -> None:
    """Look at every parameter and buffer of a component of a pipeline; what is on the meta device is passed over.

    Raises:
        CalibrationError: naming the first that is not finite.
    """
    for path, module in model.named_modules():
        kept = {name: value for name, value in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set}
        for name, value in (dict(module.named_parameters(recurse=False)) | kept).items():
            if not is_finite(value):
                raise CalibrationError(broken(name, path or type(module).__name__, f" of '{component}'"))


def broken(tensor: str, layer: str, where: str = "") -> str:
    """What is said of a float tensor that is not finite."""
    return f"the {tensor} of layer '{layer}'{where} holds NaN or inf; the checkpoint is damaged or overflowed in float16"
