"""ControlNets and encoders of pictures: named, calibrated through the pipeline, saved and opened again; layers that see no tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reelquant
from reelquant import CalibrationError, RecipeError, UnsupportedError
from reelquant.discover import denoisers_of, kind_of_component
from reelquant.models.sampling import sample
from reelquant.nn import quantized_layers
from tests.tiny.conditioned import CASES, made, texts
from tests.tiny.pipelines import FakePipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # schedulers of diffusers
FEW = {"calibrate.prompts": 2, "search.prompts": 1, "search.steps": 1}
PER_STEP = {
    "name": "per-step",
    "defaults": {"weight": {"format": "int8", "granularity": "channel"}, "input": {"format": "int8", "slots": "per_step"}},
    "rules": [{"on": "role:entry | role:exit", "skip": True}],
    "calibrate": {"prompts": 2, "probes": 1},
}


def call_of(name: str) -> dict[str, Any]:
    return CASES[name].settings | CASES[name].conditions


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("sd_controlnet", {"unet": "denoiser", "controlnet": "controlnet", "text_encoder": "text encoder", "vae": "vae"}),
        ("wan_i2v", {"transformer": "denoiser", "image_encoder": "image encoder", "text_encoder": "text encoder", "vae": "vae"}),
    ],
)
def test_what_components_are(name: str, kinds: dict[str, str]) -> None:
    pipe = made(name)
    assert {part: kind_of_component(part, pipe.components[part]) for part in kinds} == kinds
    assert list(denoisers_of(pipe)) == [part for part, kind in kinds.items() if kind == "denoiser"]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("sd_controlnet", {"unet": "qvd-w8a8", "controlnet": "qvd-w8a8"}),
        ("sd_controlnet", {"controlnet": PER_STEP}),
        ("wan_i2v", {"transformer": "minmax-w8a8", "image_encoder": "qvd-w8a8"}),
        ("svd", {"image_encoder": PER_STEP}),
    ],
)
def test_calibrated_through_the_pipeline_and_opened_again(name: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    pipe = made(name)
    report = reelquant.quantize(pipe, recipe, components=list(recipe), overrides=FEW, **call_of(name))
    assert set(report.by_component) == set(recipe)
    for part in report.by_component.values():
        assert part.latent_psnr is not None and part.latent_psnr > 30
        assert quantized_layers(pipe.components[part.component]) and not part.figures.get("picture_cosine", 1) < 0.99
    if name == "wan_i2v":  # the encoder is called without a timestep, and the transformer's steps are its own
        assert report.parts["image_encoder"].timesteps == [0.0] and len(report.parts["transformer"].timesteps) == 2
    reelquant.save(pipe, tmp_path / "out", report)
    again = reelquant.load(tmp_path / "out")
    clips = [sample(one, texts(name, 1), seed=3, output="latent", **call_of(name)) for one in (pipe, again)]
    assert (clips[0] - clips[1]).abs().max() < 1e-4


def test_encoders_get_what_needs_no_data_unless_they_are_named() -> None:
    pipe = made("svd")
    report = reelquant.quantize(pipe, "minmax-w8a8", components=["unet", "image_encoder"], overrides=FEW, **call_of("svd"))
    assert report.parts["unet"].recipe == "minmax-w8a8" and report.parts["image_encoder"].recipe == "w8a16"
    assert report.figures["image_encoder.picture_cosine_min"] > 0.999


def test_what_is_not_seen_while_sampling_is_refused_in_a_sentence() -> None:
    with pytest.raises(RecipeError, match=r"component 'text_encoder' .* has none; give it one that needs no data: w8a16 or w4a16$"):
        reelquant.quantize(made("wan_i2v"), {"text_encoder": "minmax-w8a8"}, **call_of("wan_i2v"))
    with pytest.raises(UnsupportedError, match=r"component 'adapter' \(Linear\) is neither a denoiser, a ControlNet, an encoder"):
        kind_of_component("adapter", nn.Linear(2, 2))


# --------------------------------------------------------------------------------------------------------------- layers without tokens


class Sparse(nn.Module):
    """A denoiser that calls two layers on no tokens in the first steps, or always."""

    def __init__(self, never: bool = False) -> None:
        super().__init__()
        self.until = -1.0 if never else 500.0
        self.proj, self.time, self.mid, self.out = nn.Linear(8, 32), nn.Linear(1, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        self.text_in, self.text = nn.Linear(16, 32), nn.Linear(32, 32)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        tokens = encoder_hidden_states if float(timestep.max()) < self.until else encoder_hidden_states[:, :0]
        text = self.text(self.text_in(tokens).relu())
        x = self.proj(hidden_states) + self.time(timestep.float().reshape(-1, 1) / 1000)[:, None, None, None]
        x = self.mid(x.relu())
        return (self.out((x + text.mean(1)[:, None, None, None] if text.numel() else x).relu()),)


def sparse(never: bool = False) -> FakePipeline:
    torch.manual_seed(0)
    return FakePipeline(Sparse(never).eval())


@pytest.mark.parametrize("recipe", ["minmax-w8a8", "qvd-w8a8", "lowrank-w4a8", "minmax-w8a8-fp8", PER_STEP])
def test_inputs_without_a_value_are_passed_over(recipe: Any) -> None:
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "timestep": torch.tensor([9.0, 9.0]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }
    report = reelquant.quantize(sparse(), recipe, ["a", "b"] * 6, overrides=FEW, inputs=inputs)
    assert {"text_in", "text"} & {layer.name for layer in report.layers}
    assert report.latent_psnr is not None and report.latent_psnr > 40


def test_a_layer_that_never_has_an_input_is_named() -> None:
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "timestep": torch.tensor([9.0, 9.0]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }
    with pytest.raises(CalibrationError, match=r"layer 'text(_in)?' never ran while sampling \(or only on empty inputs\)"):
        reelquant.quantize(sparse(never=True), "minmax-w8a8", ["a", "b"] * 6, overrides=FEW, inputs=inputs)
