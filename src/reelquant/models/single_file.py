"""Weights in one file, as people have them: ``FILE@PIPELINE`` is a pipeline with the denoiser of a file.

``wan.safetensors@Wan2.1-T2V-1.3B-Diffusers`` and ``wan-Q8_0.gguf@Wan2.1-T2V-1.3B-Diffusers`` are such places: everything but the denoiser
comes from the folder, which need not hold the denoiser's weights, only its ``config.json``. ``transformer_2=FILE@PIPELINE`` says which
denoiser is meant, and ``PIPELINE`` may be such a place again, for a pipeline with two experts.

diffusers' ``from_single_file`` knows the names of tensors in such files. GGUF is read and dequantized to float32 by the package ``gguf``,
which knows all its types.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._errors import CheckpointError, ReelQuantError, UnsupportedError
from reelquant.discover.arguments import kind_of
from reelquant.discover.components import CONTROLS
from reelquant.models.blank import CLASS, QUANTIZATION, read_json
from reelquant.models.sizes import check_hole

SUFFIXES = (".safetensors", ".gguf")
_PLACE = re.compile(r"(?:(?P<component>[A-Za-z_]\w*)=)?(?P<file>.+?\.(?:safetensors|gguf))@(?P<rest>.+)", re.DOTALL)


@dataclass(frozen=True)
class SingleFile:
    """A place that names a file.

    Attributes:
        file: of weights.
        rest: the place of the pipeline that everything else comes from.
        component: which denoiser the file holds; empty if the pipeline has one only.
    """

    file: Path
    rest: str
    component: str = ""

    def __str__(self) -> str:
        return f"{self.component}={self.file}@{self.rest}" if self.component else f"{self.file}@{self.rest}"


def single_file(model: Any) -> SingleFile | None:
    """The parts of a place that names a file; None for other places, and for folders that happen to be called like one."""
    found = _PLACE.fullmatch(str(model)) if isinstance(model, str | Path) else None
    if found is None or os.path.lexists(str(model)):
        return None
    return SingleFile(Path(found["file"]), found["rest"], found["component"] or "")


def file_of(part: Any) -> Path | None:
    """The file that a component in memory was read from, where it came from one of its own."""
    config = getattr(part, "config", None)
    place = Path(str(config.get("_name_or_path") or "")) if isinstance(config, Mapping) else Path()
    return place if place.suffix in SUFFIXES and not place.is_dir() else None


def check_file(model: str) -> None:
    """Refuse a place whose file is not there, and a file without a pipeline.

    Raises:
        CheckpointError: saying what to write.
    """
    found = single_file(model)
    if found is not None and not os.path.isfile(found.file):  # false also for names that a disk refuses
        raise CheckpointError(f"no file '{found.file}' for the pipeline '{found.rest}'; a place is written FILE@PIPELINE")
    if found is None and model.endswith(SUFFIXES) and os.path.isfile(model):
        raise CheckpointError(
            f"'{model}' holds the weights of one component; name the pipeline that everything else comes from: "
            f"{model}@FOLDER, where FOLDER has a model_index.json"
        )


def open_file(place: SingleFile, index: Mapping[str, Any], config: str, dtype: torch.dtype) -> tuple[str, nn.Module]:
    """The denoiser that a place names, by its component's name.

    Args:
        place: what names the file.
        index: the ``model_index.json`` of the pipeline.
        config: the folder or hub id of the pipeline, which describes the denoiser.
        dtype: of the weights; modules that their class keeps in float32 are.

    Raises:
        CheckpointError: if the file is damaged, or holds other tensors than the config describes.
        UnsupportedError: if the pipeline has not this component or has several, or diffusers reads no single files of its class.
    """
    name, kind = _component(place, index)
    try:
        model = _converted(kind, _read(place.file), config, name, dtype)
    except ReelQuantError:
        raise
    except Exception as error:  # whatever a converter stumbles over
        raise CheckpointError(
            f"'{place.file}' does not hold the tensors of {kind.__name__} as '{config}' describes it in '{name}': {_reason(error)}; "
            "name the pipeline that the file belongs to"
        ) from error
    model.register_to_config(_name_or_path=str(place.file.resolve()))
    return name, model


def _reason(error: Exception) -> str:
    words = " ".join(str(error).partition(". If you want")[0].split())
    return f"{words:.300}" if type(error) is LookupError else f"{type(error).__name__}: {words:.300}"


def _component(place: SingleFile, index: Mapping[str, Any]) -> tuple[str, Any]:
    """Name and class of the component that a file is for."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    kinds = _denoisers(index)
    names = ", ".join(kinds) or "none"
    if place.component and place.component not in kinds:
        raise UnsupportedError(f"'{place.rest}' has no denoiser '{place.component}' for '{place.file}'; it has {names}")
    if not place.component and len(kinds) != 1:
        raise UnsupportedError(
            f"'{place.file}' is the weights of one denoiser, and '{place.rest}' has {names}; say which: COMPONENT=FILE@PIPELINE"
        )
    name = place.component or next(iter(kinds))
    if not any(kind.__name__ in SINGLE_FILE_LOADABLE_CLASSES for kind in kinds[name].__mro__):
        raise UnsupportedError(
            f"diffusers reads no single files of {kinds[name].__name__} ('{name}' of '{place.rest}'); "
            "give a folder in the layout of diffusers"
        )
    return name, kinds[name]


def _denoisers(index: Mapping[str, Any]) -> dict[str, Any]:
    """The classes of a pipeline's denoisers, by component."""
    import diffusers

    found = {}
    for name, part in index.items():
        if isinstance(part, list) and len(part) == 2 and part[0] == "diffusers" and isinstance(part[1], str):
            kind = getattr(diffusers, part[1], None)
            names = set(inspect.signature(kind.forward).parameters) if hasattr(kind, "forward") else set()
            if {"latent", "timestep"} <= {kind_of((one,)) for one in names} and not names & CONTROLS:
                found[name] = kind
    return found


def _converted(kind: Any, tensors: dict[str, Tensor], config: str, component: str, dtype: torch.dtype) -> nn.Module:
    """The model with the tensors of a file, in the dtypes that ``from_pretrained`` gives it."""
    described = kind.load_config(config, subfolder=component)
    if QUANTIZATION in described:
        raise UnsupportedError(f"'{component}' of '{config}' is quantized; name a float pipeline for the file")
    blank: list[nn.Module] = []
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)  # buffers that a model computes for itself follow it
        return _typed(kind, dtype, blank).from_single_file(tensors, config=config, subfolder=component).eval()
    except NotImplementedError:  # what is left on the meta device cannot be moved
        missing = [name for model in blank for name, value in model.named_parameters() if value.is_meta]
        raise LookupError(f"it lacks {len(missing)} tensors, '{missing[0]}' first" if missing else "it lacks tensors") from None
    finally:
        torch.set_default_dtype(before)


def _typed(kind: Any, dtype: torch.dtype, made: list[nn.Module]) -> Any:
    """A class of models whose parameters wait in the dtype that they shall have.

    ``from_single_file`` casts a tensor to the dtype of the parameter that waits for it, and knows nothing of modules that stay float32.

    Args:
        kind: a class of diffusers.
        dtype: of the parameters.
        made: gets the model, whatever happens to it then.
    """
    exact = set(kind._keep_in_fp32_modules or ())

    def from_config(config: Any, **options: Any) -> nn.Module:
        model = kind.from_config(config, **options)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if exact & set(name.split(".")) else dtype)
        made.append(model)
        return model

    return type(kind.__name__, (kind,), {"from_config": staticmethod(from_config)})


def _read(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, by the names in it."""
    check_hole(file)
    try:
        return READERS[file.suffix](file)
    except ReelQuantError:
        raise
    except Exception as error:
        raise CheckpointError(f"'{file}' is truncated or corrupt ({_reason(error)}); download or save it again") from None


def _safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _gguf(file: Path) -> dict[str, Tensor]:
    try:
        import gguf
    except ImportError:
        raise UnsupportedError("GGUF files are read with the package gguf: pip install 'reelquant[export]'") from None
    found = {}
    for one in gguf.GGUFReader(file).tensors:
        values = gguf.quants.dequantize(one.data, one.tensor_type)
        found[one.name] = torch.from_numpy(values.copy())
    return found


READERS = {".safetensors": _safetensors, ".gguf": _gguf}


def index_of(file: Path | None, place: SingleFile) -> dict[str, Any]:
    """What a ``model_index.json`` holds.

    Raises:
        CheckpointError: if there is none.
    """
    found = {} if file is None else read_json(file)
    if CLASS not in found:
        raise CheckpointError(f"'{place.rest}' describes no pipeline for '{place.file}': it has no model_index.json that names a class")
    return found
