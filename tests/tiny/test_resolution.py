"""A schedule of sizes in a quantized pipeline: calibrated, stored, opened, and followed where it is asked for."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reelquant
from reelquant._errors import CheckpointError, UnsupportedError
from reelquant.checkpoint.stored import Stored
from reelquant.discover import denoiser_of
from reelquant.models.sampling import sample
from reelquant.policies import resolution_of
from reelquant.recipes.recipe import load_recipe
from tests.tiny.bundled import quiet

STAGES = [{"share": 0.34}, {"share": 0.33, "scale": 0.5}, {"share": 0.33}]
CALL: dict[str, Any] = {"num_inference_steps": 3, "num_frames": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny-dit` with weights in 8 bits and a schedule of three sizes."""
    pipe = quiet(reelquant.open_pipeline("tiny-dit"))
    reelquant.quantize(pipe, "w8a16", overrides={"resolution": STAGES})
    return reelquant.save(pipe, tmp_path_factory.mktemp("resolution") / "out")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return quiet(reelquant.load(folder))


def tokens(pipe: Any, call: Any) -> tuple[Tensor, list[int]]:
    """What a call gives, and how many latent positions of a frame every call of the denoiser saw."""
    seen: list[int] = []
    denoiser = denoiser_of(pipe)[1]
    hook = denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"][0, 0, 0].numel()), with_kwargs=True
    )
    try:
        return call(), seen[::2]  # two calls a step: guidance
    finally:
        hook.remove()


def test_a_stored_schedule_is_followed_by_our_verbs_and_by_the_pipeline_itself_on_request(pipe: Any) -> None:
    def ours() -> Tensor:
        return sample(pipe, ["a red ball"], seed=3, output="latent", **CALL)

    def its_own() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        call = CALL | {"height": 64, "width": 64, "guidance_scale": 3.0}
        return pipe(["a red ball"], generator=[generator], output_type="latent", **call).frames

    scheduled, sizes = tokens(pipe, ours)
    assert sizes == [64, 16, 64]
    _, sizes = tokens(pipe, its_own)
    assert sizes == [64, 64, 64]
    reelquant.configure(pipe, resolution=True)
    try:
        found, sizes = tokens(pipe, its_own)
        assert sizes == [64, 16, 64] and torch.equal(found, scheduled)
        assert torch.equal(ours(), scheduled)  # not followed twice
        copied = copy.deepcopy(pipe.scheduler)
        copied.set_timesteps(3)
        assert copied.timesteps is not pipe.scheduler.timesteps
    finally:
        reelquant.configure(pipe, resolution=False)
    _, sizes = tokens(pipe, its_own)
    assert sizes == [64, 64, 64]


def test_calibration_sees_every_size() -> None:
    pipe = quiet(reelquant.open_pipeline("tiny-dit"))
    recipe = {
        "name": "two sizes",
        "defaults": {"weight": {"format": "int8", "granularity": "channel"}, "input": {"format": "int8"}},
        "rules": [{"on": "role:entry | role:exit", "skip": True}],
        "resolution": STAGES,
        "calibrate": {"prompts": 1, "probes": 0},
    }

    def quantize() -> Tensor:
        reelquant.quantize(pipe, recipe, ["a red ball"], **CALL)
        return torch.zeros(())

    _, sizes = tokens(pipe, quantize)
    assert {64, 16} <= set(sizes)


def test_the_schedule_is_a_part_of_the_config(folder: Path) -> None:
    config = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["resolution"] == {"stages": [{"share": 0.34}, {"share": 0.33, "scale": 0.5}, {"share": 0.33}], "enlarge": "bicubic"}
    assert Stored.from_json(config).to_json()["resolution"] == config["resolution"]
    with pytest.raises(CheckpointError, match=r"quantization_config\.resolution"):
        Stored.from_json(config | {"resolution": {"stages": [{"share": 2}]}})


def test_what_has_no_schedule_cannot_follow_one() -> None:
    pipe = quiet(reelquant.open_pipeline("tiny-dit"))
    reelquant.quantize(pipe, "w8a16")
    assert resolution_of(denoiser_of(pipe)[1]) is None
    with pytest.raises(UnsupportedError, match="stores no schedule of sizes"):
        reelquant.configure(pipe, resolution=True)
    reelquant.configure(pipe, resolution=False)


@pytest.mark.parametrize(("name", "size"), [("bottleneck", 64), ("diffuse-high", 128)])
def test_recipes_of_the_library_that_change_sizes_run_as_they_are(name: str, size: int) -> None:
    pipe = quiet(reelquant.open_pipeline("tiny-dit"))
    chosen = load_recipe(name)
    plain = load_recipe({"extends": "w8a16", "name": name, "resolution": chosen.model_dump()["resolution"]})
    reelquant.quantize(pipe, plain)
    assert resolution_of(denoiser_of(pipe)[1]) is not None
    assert sample(pipe, ["a red ball"], num_inference_steps=8, num_frames=5).shape[-1] == size
