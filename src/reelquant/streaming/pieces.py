"""One quantized layer as a file of its own, with everything that is needed to know it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reelquant._sums import Sealed
from reelquant.checkpoint import Shards, layer_sum, tile_checksum
from reelquant.engine.quality import LayerRecord
from reelquant.nn import LayerLayout, QuantLayer, layer_facts, quantized_class


def about(layer: QuantLayer, record: LayerRecord | None, *, norm: bool = False) -> dict[str, Any]:
    """What a file says about its layer: layout, checksums, the report's record, and what computes the layer.

    Args:
        norm: whether the norm before the layer took its rewrite over, and has a file of its own.
    """
    facts = layer_facts(layer)
    known = record and asdict(record)
    sums = {"checksum": tile_checksum(layer), "sum": layer_sum(layer)}
    return {"layout": layer.layout.to_json(), **sums, "record": known, "facts": facts, "norm": norm}


def write_piece(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and what is said about them; the file appears complete or not at all."""
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    Sealed(file.parent).write(file.name, lambda path: save_file(whole, path, {"about": json.dumps(about)}))


def intact(file: Path) -> bool:
    """Whether a file of this run, or of the one that it goes on with, is there and is what was written."""
    return Sealed(file.parent).good(file.name)


def read_about(file: Path) -> dict[str, Any]:
    """What :func:`about` said."""
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["about"])


def record_in(file: Path) -> LayerRecord | None:
    """The report's record of a layer; None for drafts."""
    record = read_about(file)["record"]
    return record and LayerRecord(**record)


def empty_layer(module: nn.Module, file: Path) -> QuantLayer:
    """The layer of a file on the meta device, with the dtypes that are in the file."""
    layout = LayerLayout.from_json(read_about(file)["layout"])
    layer = quantized_class(module).like(module, layout, device="meta")
    for name, spec in Shards([file]).specs.items():
        empty = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        setattr(layer, name, nn.Parameter(empty, requires_grad=False) if name in layer._parameters else empty)
    return layer
