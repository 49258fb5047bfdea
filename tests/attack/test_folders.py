"""Damaged folders: no byte that was written changes without an error, and every error is one sentence of ours."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import reelquant
from reelquant import CheckpointError
from reelquant.checkpoint.verify import ROWS
from reelquant.models.manifest import MANIFEST
from tests.attack.damage import files_of
from tests.attack.folders import refused_when_damaged
from tests.attack.outcomes import observed
from tests.attack.sources import quantized_pipeline
from tests.grids import ALL

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_pipeline(tmp_path_factory.mktemp("saved") / "out")


@pytest.fixture
def out(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "out"))


@pytest.mark.parametrize("seed", range(20 if ALL else 10))
def test_no_damage_is_accepted(out: Path, seed: int) -> None:
    assert observed(f"folder {seed}", lambda: refused_when_damaged(out, seed)) == []


@pytest.mark.parametrize("name", ["transformer/more.safetensors", "scheduler/config.json"])
def test_a_file_more_in_a_component_is_refused(out: Path, name: str) -> None:
    shutil.copyfile(out / "model_index.json", out / name)
    with pytest.raises(CheckpointError, match=r"was added|truncated or corrupt"):
        reelquant.load(out)


def test_what_was_changed_on_purpose_is_taken_as_it_is(out: Path) -> None:
    config = out / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"shift": 1.0', '"shift": 3.0'))
    with pytest.raises(CheckpointError, match="--renew"):
        reelquant.load(out)
    assert reelquant.verify(out, renew=True).renewed
    assert reelquant.load(out).scheduler.config.shift == 3.0
    assert reelquant.verify(out).files == len(files_of(out)) - 3  # the list itself, its report and the model card are not on it


def edit(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_every_byte_of_a_layer_counts_without_sums_of_files(out: Path, component: str) -> None:
    """As from a hub, which hands over only the files of components: rows between those of the short checksum, too."""
    (out / MANIFEST).unlink()
    file = next((out / component).glob("*.safetensors"))
    name = next(name for name, value in load_file(file).items() if value.dtype == torch.int8 and len(value) > 2 * ROWS - 1)

    def change(tensors: dict[str, Tensor]) -> None:
        rows = set(range(len(tensors[name]))) - set(torch.linspace(0, len(tensors[name]) - 1, ROWS).round().long().tolist())
        tensors[name][min(rows), 0] ^= 1

    edit(file, change)
    with pytest.raises(CheckpointError, match="has checksum"):
        DiffusionPipeline.from_pretrained(out)


def test_a_bias_is_a_float(out: Path) -> None:
    (out / MANIFEST).unlink()
    bias = "blocks.0.attn1.to_k.bias"
    edit(out / "transformer" / WEIGHTS, lambda tensors: tensors.update({bias: tensors[bias].view(torch.int32)}))
    with pytest.raises(CheckpointError, match=f"'{bias}' is stored as torch.int32"):
        DiffusionPipeline.from_pretrained(out)


def test_stock_loading_checks_the_files_of_its_component(out: Path) -> None:
    edit(out / "transformer" / WEIGHTS, lambda tensors: tensors["proj_out.bias"].add_(1))
    with pytest.raises(CheckpointError, match="is not what was written"):
        DiffusionPipeline.from_pretrained(out)
