"""Outputs of temporal layers for the sampler's own timesteps: a finite set, stored exactly and looked up instead of computed.

Paper: the cache-based maintenance of "Temporal Feature Matters" (arXiv 2407.19547). Ours finds by experiment which temporal layers
nobody needs any more once the table is in force, and keeps the quantized layers for timesteps that are not in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from reelquant.nn import QuantLayer


def add_table(layer: QuantLayer, module: nn.Module, features: Tensor) -> None:
    """Store what the float ``module`` answers to ``features`` ``[steps, in]`` inside its quantized replacement."""
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        table = module(features.to(dtype)).float()
    layer.layout = replace(layer.layout, table=len(table))
    layer.register_buffer("output_table", table)


@torch.no_grad()
def drop_unused(layers: Mapping[str, QuantLayer], output: Callable[[], Tensor]) -> list[str]:
    """Find the tables that nobody reads, drop them, and return the names of their layers.

    A layer is unused if poisoning its output with NaN leaves the denoiser's output finite: its only readers are temporal layers that
    answer from their own table.

    Args:
        layers: temporal layers that have a table.
        output: calls the denoiser at a stored timestep.
    """
    unused = []
    for name, layer in layers.items():
        handle = layer.register_forward_hook(lambda module, args, result: torch.full_like(result, torch.nan))
        try:
            if bool(output().isfinite().all()):
                unused.append(name)
        finally:
            handle.remove()
    for name in unused:
        layers[name].layout = replace(layers[name].layout, unused=True)
        del layers[name].output_table
    return unused
