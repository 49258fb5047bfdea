"""The stock pipeline around denoisers that stay on disk, and adapters that are merged while tensors are read."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reelquant._errors import ReelQuantError, UnsupportedError
from reelquant.checkpoint import Workspace
from reelquant.models.blank import CLASS
from reelquant.models.compat import bridged
from reelquant.models.complete import complete
from reelquant.models.lora import LoraFiles
from reelquant.models.pipelines import cannot_open, dropped
from reelquant.models.weight_files import sole_variant, variants
from reelquant.streaming.job import Job
from reelquant.streaming.offload import keep
from reelquant.streaming.source import Source


@contextmanager
def merging(job: Job, pipe: Any) -> Iterator[None]:
    """Inside, adapters are merged into each tensor when it is read.

    Raises:
        UnsupportedError: if one changes a component that is copied as it is.
    """
    files = LoraFiles(pipe, job.adapters) if job.adapters else None
    for name in files.components if files else ():
        if name not in job.plans:
            raise UnsupportedError(
                f"the adapters change '{name}', which is copied as it is when a pipeline is quantized from disk to disk; "
                + (f"quantize '{name}', too, or " if name in job.source.disks else "")
                + "quantize in memory (reelquant.quantize; no --max-memory, no --resume)"
            )
    try:
        for name in files.components if files else ():
            job.source.disks[name].change = functools.partial(files.merged, name)
        yield
    finally:
        for disk in job.source.disks.values():
            disk.change = keep


def open_pipeline(job: Job, work: Workspace) -> Any:
    """The stock pipeline around denoisers, and large text encoders, that stay on disk.

    Raises:
        CheckpointError: if diffusers or transformers cannot open it.
    """
    try:
        with complete(job.source.folder):
            return _open(job, work)
    except ReelQuantError:
        raise
    except Exception as error:
        raise cannot_open(job.source.folder, error) from error


def _open(job: Job, work: Workspace) -> Any:
    import diffusers

    source = job.source
    # Not DiffusionPipeline: it takes no note of components given to it that are optional for the real class, and loads them itself.
    kind = getattr(diffusers, str(source.index.get(CLASS)), diffusers.DiffusionPipeline)
    parts = {name: disk.model for name, disk in source.disks.items()} | dropped(source.folder)
    for name in job.offloaded:
        parts[name] = _text_encoder(source, name, source.modules[name][1], work.folder / "work" / "offload")
    pipe = kind.from_pretrained(source.folder, dtype=source.dtype, use_safetensors=True, variant=sole_variant(source.folder), **parts)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in parts:
            part.to(source.device)
    here = property(lambda self: torch.device(source.device))  # else the pipeline reads it off parameters, which are on the meta device
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {"device": here, "_execution_device": here})
    return bridged(pipe)


def _text_encoder(source: Source, name: str, cls: str, offload: Path) -> nn.Module:
    """transformers and accelerate know how to leave theirs in the files."""
    transformers = importlib.import_module("transformers")  # as a name, so that type checkers do not read all of its models

    offload.mkdir(parents=True, exist_ok=True)
    kind = getattr(transformers, cls)
    variant = next(iter(variants(source.folder / name)), None)
    options = dict(dtype=source.dtype, variant=variant, device_map={"": "disk"}, offload_folder=str(offload))
    return kind.from_pretrained(source.folder / name, **options)
