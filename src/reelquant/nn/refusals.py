"""Methods of diffusers models that write into weights: on quantized models they say what to do instead."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NoReturn

from torch import nn

from reelquant._errors import UnsupportedError

FUSING = (
    "adapters are not fused into quantized weights: what is smaller than half a step would be lost. Leave them loaded, which costs two "
    "thin products a layer, or merge them before quantizing: reelquant.quantize(pipe, recipe, lora={file: scale})"
)
SENTENCES = {
    "fuse_lora": FUSING,
    "fuse_qkv_projections": "the query, key and value layers of a quantized model stay apart: each has scales of its own, and their common "
    "input is rounded once anyway",
}


def refuse(model: nn.Module) -> None:
    """Put a refusal in the place of every such method that the model has."""
    for name, sentence in SENTENCES.items():
        if hasattr(type(model), name):
            object.__setattr__(model, name, functools.partial(_refused, sentence))


def allow(model: nn.Module) -> None:
    """Undo :func:`refuse`."""
    for name in SENTENCES:
        vars(model).pop(name, None)


def refuse_saving(model: nn.Module, homeless: Sequence[str]) -> None:
    """Refuse to save a dequantized model whose layers ``homeless`` have biases that stock classes would not read."""
    some = ", ".join(f"'{name}'" for name in homeless[:2]) + (" ..." if len(homeless) > 2 else "")
    sentence = (
        f"{len(homeless)} layers ({some}) of this dequantized model have biases that quantization made, and {type(model).__name__} has no "
        "place for them: the folder would open without; save the quantized model, or dequantize one from a recipe without shift and "
        "correct_bias"
    )
    object.__setattr__(model, "save_pretrained", functools.partial(_refused, sentence))


def refuses_saving(model: nn.Module) -> bool:
    """Whether :func:`refuse_saving` was called for the model; its sentence says more than a look at the names of tensors."""
    return "save_pretrained" in vars(model)


def _refused(sentence: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedError(sentence)
