"""The folder of a float pipeline, opened as far as the headers of its files."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from reelquant._errors import CheckpointError, UnsupportedError
from reelquant.checkpoint import INDEX, Shards
from reelquant.discover import denoisers_of
from reelquant.models.blank import CLASS, QUANTIZATION, read_config, read_json
from reelquant.models.origin import written_down
from reelquant.models.pipelines import check_folder, files_in, local_folder
from reelquant.models.sampling import check_call
from reelquant.models.weight_files import PICKLES, sole_variant
from reelquant.streaming.offload import OnDisk, hollow

WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True, eq=False)
class Source:
    """A float pipeline's folder, opened as far as its headers.

    Attributes:
        folder: the folder.
        index: what its ``model_index.json`` says.
        dtype: of the float parts.
        device: where layers are built and the sampler runs.
        disks: every denoiser, by component name, in the order in which the sampler uses them.
        origin: what reports call it: bundled name, hub id, or where the folder is.
    """

    folder: Path
    index: Mapping[str, Any]
    dtype: torch.dtype
    device: str
    disks: dict[str, OnDisk]
    origin: str = ""

    @classmethod
    def open(cls, model: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Source:
        """Read configs and headers of a folder; that of a hub id is downloaded.

        Raises:
            CheckpointError: if files are missing, broken or pickled.
            UnsupportedError: if the pipeline has no denoiser, or is quantized.
        """
        path = local_folder(model)
        check_folder(path, sole_variant(path))
        source = cls(path, read_json(path / INDEX), dtype, device, {}, written_down(model))
        source.check_complete()
        models = {name: hollow(path / name, dtype) for name, (library, _) in source.modules.items() if library == "diffusers"}
        found = denoisers_of(SimpleNamespace(components=models))
        for name in found:
            if QUANTIZATION in read_config(path / name):
                raise UnsupportedError(f"'{path / name}' is quantized; give the folder of the float pipeline")
        return replace(source, disks={name: OnDisk(model, Shards.of(path / name), device) for name, model in found.items()})

    @property
    def components(self) -> dict[str, tuple[str, str]]:
        """Library and class of everything the pipeline is made of, by name."""
        pairs = {name: part for name, part in self.index.items() if isinstance(part, list) and len(part) == 2}
        return {name: (part[0], part[1]) for name, part in pairs.items() if all(isinstance(word, str) for word in part)}

    @property
    def modules(self) -> dict[str, tuple[str, str]]:
        """The components that have weights."""
        return {name: part for name, part in self.components.items() if any((self.folder / name).glob("*.safetensors"))}

    def check_complete(self) -> None:
        """Refuse a folder that lacks a component, the weights of one, or a shard of them: a download that was interrupted.

        Raises:
            CheckpointError: naming the first.
        """
        for name, (library, kind) in self.components.items():
            if not (self.folder / name).is_dir():
                raise CheckpointError(f"'{self.folder}' lacks its component '{name}' ({library}.{kind}); download or save it again")
            if name in self.modules or _describes_model(self.folder / name, library, kind):
                Shards.of(self.folder / name)
        for file in self.files().values():
            if not file.is_file():
                raise CheckpointError(f"'{file}' is a link to nothing; download or save it again")

    @property
    def pipe(self) -> Any:
        """Something with the name of the pipeline's class and its denoisers."""
        kind = type(str(self.index.get(CLASS)), (SimpleNamespace,), {})
        return kind(components={name: disk.model for name, disk in self.disks.items()})

    def check_denoisers(self, names: Iterable[str]) -> None:
        """Refuse components that only a pipeline in memory quantizes.

        Raises:
            UnsupportedError: naming the first.
        """
        for name in names:
            if name in self.modules and name not in self.disks:
                raise UnsupportedError(
                    f"'{name}' is not a denoiser of '{self.folder}', and only denoisers ({', '.join(self.disks)}) are quantized from "
                    "disk to disk; leave it out, or quantize in memory (reelquant.quantize; no --max-memory, no --resume)"
                )

    def check_call(self, names: Iterable[str]) -> None:
        """Refuse arguments that the call of the pipeline does not take, if diffusers has its class.

        Raises:
            UnsupportedError: naming the first.
        """
        import diffusers

        kind = getattr(diffusers, str(self.index.get(CLASS)), None)
        if kind is not None:
            check_call(kind, names)

    def stored(self) -> dict[str, int]:
        """Bytes of every component."""
        files = self.files().items()
        return {part: sum(file.stat().st_size for name, file in files if Path(name).parts[0] == part) for part in self.components}

    def files(self) -> dict[str, Path]:
        """What makes the pipeline, by path in the folder: files beside the components, and those of the components.

        Left out are hidden files, pickles, which are not loaded, the whole model once more in one file for other programs, and folders
        that are no component: an output may lie in the folder of its source.
        """
        beside = [file for file in self.folder.iterdir() if not file.is_dir() and file.suffix not in WEIGHTS]
        files = [file for part in (beside, *(files_in(self.folder / name) for name in self.components)) for file in part]
        found = {str(file.relative_to(self.folder)): file for file in sorted(files) if file.suffix not in PICKLES}
        return {name: file for name, file in found.items() if not any(word.startswith(".") for word in Path(name).parts)}


def _describes_model(folder: Path, library: str, kind: str) -> bool:
    """Whether a component's config is that of something with weights; diffusers calls those of schedulers differently."""
    config = read_config(folder)
    if library != "transformers":
        return CLASS in config
    transformers = importlib.import_module("transformers")  # as a name, so that type checkers do not read all of its models

    return bool(config) and issubclass(getattr(transformers, kind, object), nn.Module)
