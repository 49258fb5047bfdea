"""Codes of a quantized pipeline for a float model that has changed since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

import reelquant
from reelquant._errors import CheckpointError
from reelquant.nn import quantized_layers
from tests.tiny.stock import CALL, PROMPTS, stored_pipeline, wan_pipeline

LAYERS = "role:main | role:temporal | role:prompt"


def recipe(folder: Path | str, *, train: bool = True, **weight: Any) -> dict[str, Any]:
    learn = {"reconstruct": "scales", "scope": "model", "rate": 0.01, "iterations": 60, "calls": 8, "on": LAYERS}
    return {
        "extends": "personalise-w4",
        "name": "test",
        "defaults": {"weight": {"granularity": "group-16"} | weight},
        "calibrate": {"prompts": 2, "steps": 3},
        "steps": [{"solve": "stored", "folder": str(folder), "on": LAYERS}, *([learn] if train else [])],
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in four bits."""
    pipe = wan_pipeline()
    reelquant.quantize(pipe, recipe("") | {"steps": [{"solve": "gptq", "on": LAYERS}]}, PROMPTS, **CALL)
    return reelquant.save(pipe, tmp_path_factory.mktemp("base") / "out")


@torch.no_grad()
def changed() -> Any:
    """The float pipeline as an adapter of rank two would have it: every weight of attention moves by a tenth."""
    pipe = wan_pipeline()
    for seed, (name, parameter) in enumerate(pipe.transformer.named_parameters()):
        if ".attn" in name and parameter.ndim == 2:
            made = torch.Generator().manual_seed(seed)
            update = torch.randn(len(parameter), 2, generator=made) @ torch.randn(2, parameter.shape[1], generator=made)
            parameter += 0.2 * update * parameter.std() / update.std()
    return pipe


@torch.no_grad()
def output(model: Any) -> Tensor:
    made = torch.Generator().manual_seed(0)
    noise = torch.randn(1, model.config.in_channels, 3, 8, 8, generator=made)
    prompt = torch.randn(1, 5, model.config.text_dim, generator=made)
    return model(hidden_states=noise, timestep=torch.tensor([500.0]), encoder_hidden_states=prompt, return_dict=False)[0]


def test_codes_stay_scales_move_and_the_output_comes_nearer(base: Path, tmp_path: Path) -> None:
    teacher = output(changed().transformer)
    student, plain = changed(), changed()
    report = reelquant.quantize(student, recipe(base), PROMPTS, **CALL)
    reelquant.quantize(plain, recipe(base, train=False), PROMPTS, **CALL)
    assert not [warning for warning in report.warnings if "codes stay" in warning]
    first = quantized_layers(WanTransformer3DModel.from_pretrained(base, subfolder="transformer"))
    reelquant.save(student, tmp_path / "out")
    opened = quantized_layers(WanTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer"))
    assert all(torch.equal(opened[name].codes, layer.codes) for name, layer in first.items())
    assert any(not torch.equal(opened[name].weight_scale, layer.weight_scale) for name, layer in first.items())
    errors = [float((output(pipe.transformer) - teacher).square().mean()) for pipe in (student, plain)]
    assert errors[0] < errors[1]


def test_folders_that_do_not_fit(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="which are not those of int3 per group-16"):
        reelquant.quantize(changed(), recipe(base, train=False, format="int3"), PROMPTS, **CALL)
    kept = stored_pipeline(tmp_path / "float")
    with pytest.raises(CheckpointError, match=r"keeps layer 'condition_embedder.*' in float; skip it here, too"):
        reelquant.quantize(changed(), recipe(kept, train=False), PROMPTS, **CALL)
    with pytest.raises(CheckpointError, match="has no quantized layer"):
        reelquant.quantize(changed(), recipe(tmp_path / "nothing", train=False), PROMPTS, **CALL)
