"""Write a whole pipeline as a stock diffusers folder: in one piece, and the same bytes for the same model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant._sums import write_summed
from reelquant.checkpoint.as_stored import keep_stored, sources
from reelquant.checkpoint.card import write_card
from reelquant.checkpoint.folder import INDEX, absolute, check_target, new_folder, refuse_source
from reelquant.checkpoint.stored import adopt
from reelquant.checkpoint.tokenizers import as_stored
from reelquant.discover.components import plain
from reelquant.models.blank import QUANTIZATION, check_names, read_config
from reelquant.models.fused import drop_unused_projections
from reelquant.models.manifest import CARD, REPORT, write_manifest
from reelquant.models.origin import SOURCE, holds_quantized, origin_of
from reelquant.models.sampling import NOTES_FILE
from reelquant.models.weight_files import weight_bytes
from reelquant.nn import quantized_layers
from reelquant.nn.refusals import refuses_saving

REPORT_FILE = REPORT
_PATH_KEYS = ("_name_or_path", "name_or_path")


class Writable(Protocol):
    """A report."""

    bytes_source: int | None
    bytes_folder: int | None

    def save(self, path: str | Path) -> None: ...


def save(
    pipe: Any,
    folder: str | Path,
    report: Writable | None = None,
    *,
    force: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write a pipeline, quantized or float, as a folder that ``DiffusionPipeline.from_pretrained`` opens.

    The folder appears complete or not at all. Apart from ``report.json``, which holds timings, the same model gives the same bytes. A
    quantized one gets a model card, ``README.md``, with the sizes and figures of the report; without a report, that of the quantized folder
    that it was opened from is kept.

    Args:
        pipe: a diffusers pipeline.
        folder: where to; its parents are made.
        report: written as ``report.json``; without one, that file says no more than what the pipeline was quantized from, if that is known.
        force: replace an existing pipeline folder, once the new one is complete.
        dtype: store float parts in this dtype; by default in the one they have, and components without quantized layers as they were
            stored, if they were not changed since. Scales and tables always keep theirs.
        max_shard_size: as in diffusers, ``"5GB"``.

    Returns:
        The absolute path of the folder.

    Raises:
        CheckpointError: if the folder exists, or the disk does not take the files.
        UnsupportedError: if the pipeline has a part that diffusers cannot save, or would not read again.
    """
    check_target(folder, force=force)
    _describe(pipe)
    _refuse_original(pipe, folder)
    with new_folder(folder, force=force) as temporary:
        with as_stored(pipe):
            pipe.save_pretrained(temporary, safe_serialization=True, max_shard_size=max_shard_size)
        _check_complete(pipe, temporary)
        forget_paths(temporary)
        homes = sources(pipe, list(_modules(pipe)))
        if dtype is not None:
            _cast(pipe, temporary, dtype)
        variant = keep_stored(_untouched(pipe), homes, temporary) if dtype is None else None
        if report is not None:
            known = all(name in homes for name in _modules(pipe))
            report.bytes_source = weight_bytes(homes.values(), variant) if known else None
            report.bytes_folder = weight_bytes(temporary / name for name in _modules(pipe))
            report.save(temporary / REPORT_FILE)
        elif any(quantized_layers(part) for part in _modules(pipe).values()) and (origin := origin_of(pipe)):
            write_summed(temporary / REPORT_FILE, {SOURCE: origin})
        source = Path(str(pipe.config.get("_name_or_path", "")))
        _copy(source / NOTES_FILE, temporary)
        if report is None and holds_quantized(source):
            _copy(source / CARD, temporary)  # nothing was measured since
        write_card(temporary)
        write_manifest(temporary)
        _share(temporary)
    return absolute(folder)


def _modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: plain(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _untouched(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in _modules(pipe).items() if not quantized_layers(part)}


def _describe(pipe: Any) -> None:
    if not hasattr(pipe, "save_pretrained"):
        raise UnsupportedError(f"{type(pipe).__name__} has no save_pretrained; give a diffusers pipeline")
    for name, part in _modules(pipe).items():
        if quantized_layers(part):
            adopt(part)
        if not refuses_saving(part):
            drop_unused_projections(part)
            check_names(name, part)


def _refuse_original(pipe: Any, folder: str | Path) -> None:
    """A quantized pipeline may replace a quantized folder, but not the float one that it was made of."""
    source = Path(str(getattr(pipe, "config", {}).get("_name_or_path") or "/dev/null"))
    for name, part in _modules(pipe).items():
        if quantized_layers(part) and source.is_dir() and QUANTIZATION not in read_config(source / name):
            refuse_source(folder, source)


def _check_complete(pipe: Any, folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    for name, part in pipe.components.items():
        if part is not None and index.get(name) in (None, [None, None]):
            raise UnsupportedError(f"diffusers cannot save component '{name}' ({type(part).__name__}), the folder would not open again")


def forget_paths(folder: Path) -> None:
    """Drop where parts were loaded from: private, and different on every machine."""
    for file in sorted(folder.rglob("*.json")):
        text = file.read_text(encoding="utf-8")
        if not any(f'"{key}"' in text for key in _PATH_KEYS):
            continue
        data = json.loads(text)
        if not isinstance(data, dict):
            continue
        local = [key for key in _PATH_KEYS if Path(str(data.get(key, ""))).is_absolute() or Path(str(data.get(key, ""))).is_dir()]
        file.write_text(json.dumps({key: value for key, value in data.items() if key not in local}, indent=2) + "\n", encoding="utf-8")


def _cast(pipe: Any, folder: Path, dtype: torch.dtype) -> None:
    """Rewrite weight files with their float tensors in ``dtype``; those of quantized layers (but the bias) keep theirs."""
    from safetensors.torch import load_file, save_file

    for name, part in _modules(pipe).items():
        exact_layers, paths = quantized_layers(part), {path for path, _ in part.named_modules()}
        names = getattr(part, "_keep_in_fp32_modules", None) or []

        def cast(key: str, value: Tensor, layers: Any = exact_layers, paths: Any = paths, fp32: Any = names) -> Tensor:
            layer, _, tensor = key.rpartition(".")
            exact = (_path_in(paths, layer) in layers and tensor != "bias") or any(word in key.split(".") for word in fp32)
            return value if exact or not value.is_floating_point() else value.to(dtype)

        for file in sorted((folder / name).glob("*.safetensors")):
            tensors = {key: cast(key, value) for key, value in load_file(file).items()}
            fresh = file.with_suffix(".cast")  # the tensors are views of the old file
            save_file(tensors, fresh, metadata={"format": "pt"})
            fresh.replace(file)


def _path_in(paths: Container[str], layer: str) -> str:
    """The path in the model of a layer in its file: transformers writes the files of some text encoders with a prefix."""
    while layer not in paths and "." in layer:
        layer = layer.partition(".")[2]
    return layer


def _copy(file: Path, folder: Path) -> None:
    if file.is_file():
        shutil.copyfile(file, folder / file.name)


def _share(folder: Path) -> None:
    """safetensors makes its files readable by their owner only; give them the permissions of all others."""
    for file in folder.rglob("*.safetensors"):
        file.chmod((folder / INDEX).stat().st_mode)
