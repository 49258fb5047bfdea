"""The components of a pipeline's folder without their weights: modules on the meta device, from configs and headers alone."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reelquant._errors import CheckpointError
from reelquant.discover import TIMED, discover_or_outline, kind_of_component, outline, stand_in
from reelquant.discover.components import Kind
from reelquant.engine.quality import model_bytes
from reelquant.models.blank import CONFIG
from reelquant.sites import DenoiserMap
from reelquant.streaming import Source
from reelquant.streaming.offload import hollow


@dataclass(frozen=True, eq=False)
class Part:
    """A component with weights.

    Attributes:
        name: of the component.
        kind: what it does.
        model: the module; its parameters are on the meta device, in the dtype that they would be loaded in.
        stored: bytes of its files.
    """

    name: str
    kind: Kind
    model: nn.Module
    stored: int

    @property
    def denoises(self) -> bool:
        """Whether it runs at every denoising step."""
        return self.kind in TIMED

    @cached_property
    def map(self) -> DenoiserMap:
        """Its layers and their roles."""
        return discover_or_outline(self.model, stand_in) if self.denoises else outline(self.model)

    @cached_property
    def bytes(self) -> int:
        """Bytes of its parameters and buffers in float."""
        return model_bytes(self.model)


def parts_of(source: Source) -> dict[str, Part]:
    """Every component that has weights, in the order of ``model_index.json``.

    Raises:
        CheckpointError: if a class is not one of the installed libraries, or its config is broken.
        UnsupportedError: if it is not known what a component does.
    """
    stored, found = source.stored(), {}
    for name, (library, kind) in source.modules.items():
        folder = source.folder / name
        model = source.disks[name].model if name in source.disks else _model(folder, library, kind, source.dtype)
        found[name] = Part(name, kind_of_component(name, model), model, stored[name])
    return found


def _model(folder: Path, library: str, kind: str, dtype: torch.dtype) -> nn.Module:
    return hollow(folder, dtype) if library == "diffusers" else _of_transformers(folder, library, kind, dtype)


def _of_transformers(folder: Path, library: str, kind: str, dtype: torch.dtype) -> nn.Module:
    """A model of transformers, or of another library with its interface, as ``from_pretrained(dtype=...)`` would load it."""
    from accelerate import init_empty_weights

    try:
        cls: Any = getattr(importlib.import_module(library), kind)
        config = cls.config_class.from_pretrained(folder)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"'{folder / CONFIG}' describes no {library}.{kind} that can be planned: {reason:.200}") from error
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with init_empty_weights():
            return cls(config).to(dtype).eval()
    finally:
        torch.set_default_dtype(before)


def as_modules(parts: Mapping[str, Part]) -> dict[str, nn.Module]:
    """The modules by name."""
    return {name: part.model for name, part in parts.items()}
