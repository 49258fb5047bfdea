"""What a whole quantized denoiser has beside its layers: faster attention, fused activations, methods that are refused."""

from __future__ import annotations

from torch import nn

from reelquant.kernels import current_backend
from reelquant.nn.attention import start_attention, stop_attention
from reelquant.nn.fuse import fuse_activations, part_activations
from reelquant.nn.refusals import allow, refuse


def start_runtime(model: nn.Module) -> None:
    """Switch it on, twice is once; nothing is made faster if the reference was asked for."""
    refuse(model)
    if current_backend() == "auto":
        start_attention(model)
        fuse_activations(model)


def stop_runtime(model: nn.Module) -> None:
    """Undo :func:`start_runtime`."""
    allow(model)
    stop_attention(model)
    part_activations(model)
