"""Float weights of one byte a number (checkpoints in float8, layerwise casting), which are widened before they are looked at."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def is_narrow(value: Tensor) -> bool:
    """Whether these are floats of one byte, which torch stores and hardly computes with."""
    return value.is_floating_point() and value.dtype.itemsize == 1


def widened(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Narrow floats as ``dtype`` (float32 by default), which loses nothing; all others as they are."""
    return value.to(dtype or torch.float32) if is_narrow(value) else value


def widened_layer(layer: nn.Module) -> nn.Module:
    """The layer, or one like it whose narrow tensors are in the dtype that it computes in."""
    if not any(is_narrow(parameter) for parameter in layer.parameters(recurse=False)):
        return layer
    new, dtype = copy.copy(layer), _compute_dtype(layer)
    new._parameters = {
        key: None if value is None else nn.Parameter(widened(value.data, dtype), requires_grad=False)
        for key, value in layer._parameters.items()
    }
    return new


def _compute_dtype(layer: nn.Module) -> torch.dtype | None:
    """What diffusers' layerwise casting computes a layer in; None for others."""
    registry = getattr(layer, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook("layerwise_casting")
    return getattr(hook, "compute_dtype", None)
