"""``model.to(dtype)`` of quantized models: diffusers refuses every cast, also one to the dtype that the float parts have already.

diffusers itself asks for such casts: when an image adapter has been loaded, and when a pipeline is made from the parts of another one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from reelquant.nn.layers import QuantLayer

METHODS = {"to": None, "float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
"""Methods that cast, and to which dtype; None: their arguments say it. diffusers lets the last two pass."""


def accept_own_dtype(model: nn.Module) -> None:
    """Let the model be cast to the dtype of its float parts: only what was added in another dtype changes."""
    if isinstance(getattr(type(model), "dtype", None), property):
        for name, dtype in METHODS.items():
            object.__setattr__(model, name, MethodType(_to if dtype is None else _casting(dtype), model))


def refuse_own_dtype(model: nn.Module) -> None:
    """Undo :func:`accept_own_dtype`."""
    for name in METHODS:
        vars(model).pop(name, None)


def _to(model: Any, *args: Any, **kwargs: Any) -> nn.Module:
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    if dtype is None or dtype != model.dtype:
        return type(model).to(model, *args, **kwargs)
    _cast_floats(model, dtype)
    return model if device is None else type(model).to(model, device, non_blocking=non_blocking)


def _casting(dtype: torch.dtype) -> Callable[[Any], nn.Module]:
    return lambda model: _to(model, dtype)


def _cast_floats(model: Any, dtype: torch.dtype) -> None:
    """Float parts that are of another dtype without the model asking for it."""
    kept = {word for kind in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict") for word in getattr(model, kind, None) or ()}
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != dtype and not kept & {*name.split("."), key}:
                parameter.data = parameter.data.to(dtype)
