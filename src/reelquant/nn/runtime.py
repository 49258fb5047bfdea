"""What makes a whole quantized denoiser faster than its layers alone: attention, and activations fused into layers."""

from __future__ import annotations

from torch import nn

from reelquant.kernels import current_backend
from reelquant.nn.attention import start_attention, stop_attention
from reelquant.nn.fuse import fuse_activations, part_activations


def start_runtime(model: nn.Module) -> None:
    """Switch it on, unless the reference was asked for; twice is once."""
    if current_backend() == "auto":
        start_attention(model)
        fuse_activations(model)


def stop_runtime(model: nn.Module) -> None:
    """Undo :func:`start_runtime`."""
    stop_attention(model)
    part_activations(model)
