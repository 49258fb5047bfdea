"""How large a quantized component will be: what dry runs and plans say, and folders are held against."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor, nn

from reelquant.engine.plan import Plan
from reelquant.engine.quality import model_bytes
from reelquant.nn import get_module

TEXT = 1000
"""Bytes of what config.json and report.json say of a quantized layer, about: it counts in small models."""


def stored_bytes(model: nn.Module) -> int:
    """Bytes of what a checkpoint holds of a model: buffers that it computes for itself are left out."""
    return _bytes(model.state_dict().values())


def quantized_bytes(plan: Plan, model: nn.Module, *, stored: bool = False) -> int:
    """Bytes of a component once it is quantized: its quantized layers, and everything else as it is.

    Args:
        plan: of the component.
        model: the float module; its parameters may be on the meta device, in the dtype that float parts will have.
        stored: in a folder, with what its texts say; by default in memory.
    """
    floats = sum(_bytes(get_module(model, row.layer.name).parameters(recurse=False)) for row in plan.quantized)
    whole = stored_bytes(model) + TEXT * len(plan.quantized) if stored else model_bytes(model)
    return whole - floats + layers_bytes(plan)


def layers_bytes(plan: Plan) -> int:
    """Bytes of the quantized layers. Where a stage chooses formats for a budget of bits, its layers take the budget."""
    chosen: set[str] = set()
    total = 0.0
    for entry in plan.acting("choose_specs"):
        rows = [plan.layers[name] for name in plan.touched(entry) if name not in chosen]
        bits: float = entry.stage.bits  # pyright: ignore  # every allocator has it
        total += sum(bits * math.prod(row.layer.shape) / 8 + row.bytes_beside for row in rows)
        chosen |= {row.layer.name for row in rows}
    return round(total) + sum(row.bytes_after for row in plan.quantized if row.layer.name not in chosen)


def table_bytes(plan: Plan, steps: int) -> int:
    """Bytes of what stages store of layers for every step of a sampler, at most: some of it turns out not to be read, and is dropped."""
    rows = ((row, entry, number) for row in plan.quantized for number, entry in enumerate(row.entries))
    return steps * sum(entry.stage.stored_by_step(row.site_before(number)) for row, entry, number in rows)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
