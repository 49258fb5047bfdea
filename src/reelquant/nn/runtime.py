"""What makes a whole quantized denoiser faster than its layers alone: attention, and activations fused into layers."""

from __future__ import annotations

from torch import nn

from reelquant.kernels import check_backend, current_backend
from reelquant.nn.attention import start_attention, stop_attention
from reelquant.nn.fuse import fuse_activations, part_activations
from reelquant.nn.swap import quantized_layers


def start_runtime(model: nn.Module) -> None:
    """Switch it on, unless the reference was asked for; twice is once."""
    if current_backend() == "auto":
        start_attention(model)
        fuse_activations(model)


def stop_runtime(model: nn.Module) -> None:
    """Undo :func:`start_runtime`."""
    stop_attention(model)
    part_activations(model)


def set_kernels(model: nn.Module, name: str) -> None:
    """Let one model be computed by ``reference`` or ``auto`` kernels, from its next call on; other models are left alone.

    Raises:
        RecipeError: if there are no kernels of that name.
    """
    check_backend(name)
    stop_runtime(model)
    for layer in quantized_layers(model).values():
        layer.release()
        layer.kernels = name
    if name == "auto":
        start_runtime(model)
