"""What quantization left alone is written as it was stored: opening a pipeline may have cast it, to twice its size or to half of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.models.blank import CONFIG, read_config
from reelquant.models.single_file import file_of
from reelquant.models.weight_files import loaded_files, stored_variants

_DTYPE = ("dtype", "torch_dtype")  # what transformers calls it in its configs


class Numbers:
    """The tensors of some safetensors files, read one at a time.

    Attributes:
        kinds: dtype by name, as safetensors writes it.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        from safetensors import safe_open

        self._files = [safe_open(file, "pt") for file in files]
        self._homes: dict[str, Any] = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118
        self.kinds = {name: file.get_slice(name).get_dtype() for name, file in self._homes.items()}
        sole = set(self.kinds.values())
        self._sole = _SHORTER.get(next(iter(sole))) if len(sole) == 1 else None

    def behind(self, name: str, value: Tensor) -> Tensor | None:
        """The stored tensor that a written one was cast from; None if it was not.

        One that is stored under another name is taken to have the dtype of all others, if it fits into that.
        """
        if name in self._homes:
            stored = self._homes[name].get_tensor(name)
        else:
            stored = value if self._sole is None or not value.is_floating_point() else value.to(self._sole)
        same = stored.shape == value.shape and torch.equal(stored.to(value.dtype), value)
        return stored if same else None


_SHORTER = {"F16": torch.float16, "BF16": torch.bfloat16}


def keep_stored(parts: Mapping[str, nn.Module], sources: Mapping[str, Path], folder: Path) -> str | None:
    """Rewrite the written files of components whose every tensor is what its source holds, as that holds it.

    Args:
        parts: components without quantized layers, by name.
        sources: the folders that components were read from.
        folder: of the pipeline that was just written.

    Returns:
        The variant of the weight files that was read, as far as it shows.
    """
    found: set[str | None] = set()
    for name in parts:
        if name not in sources:
            continue
        variants = stored_variants(sources[name])
        for variant in variants:
            numbers = Numbers(loaded_files(sources[name], variant))
            if (len(variants) == 1 and numbers.kinds == kinds_of(folder / name)) or _restored(folder / name, numbers):
                _tell_dtype(folder / name, sources[name])
                found.add(variant)
                break
    return next(iter(found)) if len(found) == 1 else None


def kinds_of(folder: Path) -> dict[str, str]:
    """The dtypes of what was written: if they are those of the source, there is nothing to do."""
    return Numbers(sorted(folder.glob("*.safetensors"))).kinds


def _restored(written: Path, numbers: Numbers) -> bool:
    """Put the stored tensors in the place of the written ones; False, and nothing is changed, if one of them is another."""
    from safetensors.torch import save_file

    fresh: dict[Path, Path] = {}
    try:
        for file in sorted(written.glob("*.safetensors")):
            tensors = {name: (value, numbers.behind(name, value)) for name, value in _tensors(file).items()}
            if any(stored is None for _, stored in tensors.values()):
                return False
            kept = {name: stored for name, (_, stored) in tensors.items() if stored is not None}
            if any(value.dtype != kept[name].dtype for name, (value, _) in tensors.items()):
                fresh[file] = file.with_suffix(".stored")  # the tensors are views of the old file
                save_file({name: value.contiguous() for name, value in kept.items()}, fresh[file], metadata={"format": "pt"})
        for file, new in fresh.items():
            new.replace(file)
        _tell_total(written)
        return True
    finally:
        for new in fresh.values():
            new.unlink(missing_ok=True)


def _tensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _tell_total(written: Path) -> None:
    """The size that an index of shards names."""
    for index in written.glob("*.safetensors.index.json"):
        told = json.loads(index.read_text(encoding="utf-8"))
        total = sum(value.nbytes for file in written.glob("*.safetensors") for value in _tensors(file).values())
        told["metadata"] = dict(told.get("metadata") or {}) | {"total_size": total}
        index.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tell_dtype(written: Path, source: Path) -> None:
    """The dtype in a config of transformers, which decides in which one the files are loaded again."""
    config, before = read_config(written), read_config(source)
    keys = [key for key in _DTYPE if key in config]
    if not keys:
        return
    told = next((before[key] for key in _DTYPE if key in before), None)
    changed = {key: value for key, value in config.items() if key not in keys} | ({} if told is None else dict.fromkeys(keys, told))
    (written / CONFIG).write_text(json.dumps(changed, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def sources(pipe: Any, names: Sequence[str]) -> dict[str, Path]:
    """The folders that components of a pipeline were read from, as far as they are on this machine."""
    whole = _path(getattr(pipe, "config", {}))
    found = {}
    for name in names:
        if file_of(pipe.components[name]) is not None:  # where tensors have other names
            continue
        own = _path(getattr(pipe.components[name], "config", {}))
        places = [place for place in (own, own and own / name, whole and whole / name) if place is not None]
        home = next((place for place in places if place.is_dir() and stored_variants(place)), None)
        if home is not None:
            found[name] = home
    return found


def _path(config: Any) -> Path | None:
    """Where a config says that its model was read from."""
    told = config.get("_name_or_path") if isinstance(config, Mapping) else getattr(config, "_name_or_path", None)
    return Path(str(told)) if told else None
