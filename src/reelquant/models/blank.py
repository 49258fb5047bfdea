"""The architecture a component's folder describes, without its numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from reelquant._errors import CheckpointError, UnsupportedError
from reelquant.nn import quantized_layers

CONFIG, CLASS, QUANTIZATION = "config.json", "_class_name", "quantization_config"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        CheckpointError: if it cannot be read, or is not a JSON object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read '{file}' ({error.strerror}); download or save it again") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{file}' is not JSON ({error}); download or save it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"'{file}' must hold a JSON object, got {found!r:.60}; download or save it again")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a component's folder; empty if it has none.

    Raises:
        CheckpointError: if it is not a JSON object.
    """
    file = folder / CONFIG
    return read_json(file) if file.is_file() else {}


def opens_single_files(model: nn.Module) -> bool:
    """Whether diffusers opens single files (GGUF among them) of this class."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    return any(kind.__name__ in SINGLE_FILE_LOADABLE_CLASSES for kind in type(model).__mro__)


def blank_model(folder: Path) -> nn.Module:
    """The float model of a component's folder, parameters on the meta device.

    Raises:
        CheckpointError: if its config is missing or broken, or its class is not one of the installed diffusers.
    """
    import diffusers

    config = read_json(folder / CONFIG)
    kind = getattr(diffusers, str(config.get(CLASS)), None)
    if not hasattr(kind, "from_config"):
        raise CheckpointError(f"'{folder / CONFIG}' names the class {config.get(CLASS)!r}, which diffusers {diffusers.__version__} lacks")
    return _blank(kind, config)


def _blank(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    from accelerate import init_empty_weights

    with init_empty_weights():
        return kind.from_config({key: value for key, value in config.items() if key != QUANTIZATION})


def check_names(name: str, model: nn.Module) -> None:
    """Refuse a model whose tensors are not those of its class with its config: what is written of it could not be read.

    Fused projections, image adapters and exchanged blocks do that. Tensors that quantization made are left out.

    Args:
        name: of the component, for the message.
        model: of diffusers, quantized or not; others are passed over.

    Raises:
        UnsupportedError: naming the first tensors.
    """
    if not hasattr(type(model), "from_config") or not hasattr(model, "config"):
        return
    layers = quantized_layers(model)
    there, expected = (
        {key for key in part.state_dict() if key.rpartition(".")[0] not in layers} | _weights(part, layers)
        for part in (model, _blank(type(model), model.config))
    )
    for names, verb, whose in ((there - expected, "has", "that its class does not have"), (expected - there, "lacks", "of its class")):
        if names:
            some = ", ".join(f"'{key}'" for key in sorted(names)[:2]) + (" ..." if len(names) > 2 else "")
            raise UnsupportedError(
                f"'{name}' ({type(model).__name__}) {verb} {len(names)} tensors {whose} with its config ({some}), so a saved folder would "
                "not open; undo what changed its layers (unfuse_qkv_projections(), unload_ip_adapter(), unload_lora_weights() ...) before "
                "it is quantized or saved"
            )


def _weights(model: nn.Module, layers: Iterable[str]) -> set[str]:
    modules = dict(model.named_modules())
    return {f"{name}.weight" for name in layers if name in modules}
