"""Is what was loaded what was saved? Sums per layer, of values and not of files, so that resharding keeps them.

Folders have sums of their files as well (:mod:`reelquant.models.manifest`). Where those have been checked, a short checksum per layer
shows that every layer got its own tensors; where there are none, the sum of all its bytes is compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from reelquant._errors import CheckpointError, RecipeError
from reelquant.formats import Levels, Quantizer
from reelquant.kernels import PackedWeight
from reelquant.nn import QuantLayer, quantized_layers

ROWS = 8  # of the weight, evenly spread
DIGITS = 12


def tile_checksum(layer: QuantLayer) -> str:
    """Hash of some dequantized rows of the weight and of every scale, shift and table of the layer.

    The rows are dequantized on the CPU, so every machine gets the same bits. The bias is left out: it follows the dtype of the load.
    """
    digest = hashlib.sha256(_bytes(_tile(layer.packed)))
    for name, value in sorted(layer.named_buffers(recurse=False)):
        digest.update(name.encode())
        digest.update(_bytes(value))
    return digest.hexdigest()[:DIGITS]


def layer_sum(layer: QuantLayer) -> str:
    """Hash of every byte of a layer, with names, dtypes and shapes. The bias is left out: it follows the dtype of the load."""
    digest = hashlib.sha256()
    for name, value in sorted(layer.state_dict().items()):
        if name != "bias":
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(_memory(value))
    return digest.hexdigest()


def _memory(value: Tensor) -> memoryview:
    return memoryview(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _tile(weight: PackedWeight) -> Tensor:
    count = weight.shape[0]
    rows = torch.linspace(0, count - 1, min(ROWS, count)).round().long()
    quantizer = weight.quantizer

    def of_rows(units: Tensor | None) -> Tensor | None:
        if units is None or quantizer.granularity.kind == "tensor":
            return None if units is None else units.cpu()
        return units.reshape(count, -1)[rows.to(units.device)].flatten().cpu()

    scale = of_rows(quantizer.scale)
    assert scale is not None
    table = quantizer.format.table
    fmt = quantizer.format if table is None else Levels(table.cpu(), quantizer.format.bits)
    part = Quantizer(fmt, quantizer.granularity, scale, of_rows(quantizer.zero_point))
    return PackedWeight(weight.codes[rows.to(weight.codes.device)].cpu(), part, (len(rows), *weight.shape[1:])).dequantize()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def verify(model: nn.Module, checksums: Mapping[str, str], sums: Mapping[str, str] | None = None) -> int:
    """Compare every quantized layer with its checksum; layers offloaded to the meta device are passed over.

    Args:
        model: with all its tensors, before kernels take weights over.
        checksums: a :func:`tile_checksum` per layer.
        sums: a :func:`layer_sum` per layer; layers that have none, as older versions wrote them, are compared by their checksum alone.

    Returns:
        The number of layers that were checked.

    Raises:
        CheckpointError: naming the first layer that holds other values, or NaN or inf.
    """
    present = {name: layer for name, layer in quantized_layers(model).items() if layer.weight.device.type != "meta"}
    for name, layer in present.items():
        verify_layer(name, layer, checksums[name], (sums or {}).get(name))
    return len(present)


def verify_layer(name: str, layer: QuantLayer, checksum: str, whole: str | None = None) -> None:
    """Compare one layer with its checksum, and with the sum of all its bytes if there is one.

    Raises:
        CheckpointError: naming the layer, if it holds other values, or NaN or inf.
    """
    for tensor, value in layer.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise CheckpointError(f"'{name}.{tensor}' holds NaN or inf: the checkpoint is damaged; download or save it again")
    found = _checksum_or_reason(layer)
    if found == checksum and whole is not None and whole != (every := layer_sum(layer)):
        found, checksum = every, whole
    if found != checksum:
        raise CheckpointError(
            f"layer '{name}' has checksum {found}, its quantization_config says {checksum}: the weights are damaged or were "
            "changed after quantization; download them again, or save the pipeline with reelquant.save"
        )


def _checksum_or_reason(layer: QuantLayer) -> str:
    """The checksum, or why it cannot be computed: damaged level tables are refused by the format they belong to."""
    try:
        return tile_checksum(layer)
    except RecipeError as error:
        return f"none ({error})"
