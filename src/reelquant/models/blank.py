"""The architecture a component's folder describes, without its numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from reelquant._errors import CheckpointError

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
    except ValueError as error:
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
    from accelerate import init_empty_weights

    config = read_json(folder / CONFIG)
    kind = getattr(diffusers, str(config.get(CLASS)), None)
    if not hasattr(kind, "from_config"):
        raise CheckpointError(f"'{folder / CONFIG}' names the class {config.get(CLASS)!r}, which diffusers {diffusers.__version__} lacks")
    with init_empty_weights():
        return kind.from_config({key: value for key, value in config.items() if key != QUANTIZATION})
