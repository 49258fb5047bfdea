"""Float folders whose files and settings do not belong together: refused on both ways, and no tensor is ever a random number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import reelquant
from reelquant import CheckpointError
from tests.tiny.stock import CALL, PROMPTS, wan_pipeline

WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
RECIPE = {"name": "test", "defaults": {"weight": {"format": "int8", "granularity": "channel"}}, "calibrate": {"prompts": 1, "steps": 2}}
SAMPLED = RECIPE | {"defaults": RECIPE["defaults"] | {"input": {"format": "int8"}}}
"""Clips are sampled only where inputs are rounded, and only then the other components are opened."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "wan"
    wan_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "wan"))


def lack(tensors: dict[str, Tensor]) -> None:
    del tensors[sorted(name for name in tensors if name.endswith("weight"))[3]]


def surplus(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.more.weight"] = torch.zeros(3)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors[sorted(name for name in tensors if name.endswith("weight"))[3]] = torch.zeros(3, 2)


@pytest.mark.parametrize("change", [lack, surplus, reshape])
@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("quiet", [False, True])
def test_tensors(folder: Path, component: str, change: Callable[[dict[str, Tensor]], None], quiet: bool) -> None:
    """Also where the command line has told the libraries to log errors only."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    file = folder / component / WEIGHTS[component]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    try:
        for library in libraries if quiet else ():
            library.set_verbosity_error()
        with pytest.raises(CheckpointError, match=r"tensors (are missing|have no place)|expected shape"):
            reelquant.open_pipeline(folder)
    finally:
        for library, level in zip(libraries, before, strict=True):
            library.set_verbosity(level)


@pytest.mark.parametrize("layers", [1, 3])
def test_settings(folder: Path, layers: int, tmp_path: Path) -> None:
    """``num_layers`` is 2 in the file."""
    change_config(folder / "transformer" / "config.json", num_layers=layers)
    with pytest.raises(CheckpointError, match="tensors"):
        reelquant.open_pipeline(folder)
    with pytest.raises(CheckpointError, match=r"lacks|has no place"):
        reelquant.quantize_folder(folder, tmp_path / "out", RECIPE, PROMPTS, **CALL)


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_a_streamed_run_needs_all_tensors_of_other_components(folder: Path, component: str, tmp_path: Path) -> None:
    tensors = load_file(folder / component / WEIGHTS[component])
    lack(tensors)
    save_file(tensors, folder / component / WEIGHTS[component], metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="tensors are missing"):
        reelquant.quantize_folder(folder, tmp_path / "out", SAMPLED, PROMPTS, **CALL)


def test_a_setting_that_the_class_does_not_know_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_config(folder / "transformer" / "config.json", future_option=1, _diffusers_version="99.0")
    reelquant.open_pipeline(folder)
    assert "future_option" in caplog.text


def test_a_setting_that_the_class_would_not_have_written_is_refused(folder: Path) -> None:
    change_config(folder / "vae" / "config.json", z_dims=4)
    with pytest.raises(CheckpointError, match=r"vae/config.json' says that diffusers .* wrote it, and has settings .*z_dims"):
        reelquant.open_pipeline(folder)


def change_config(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
