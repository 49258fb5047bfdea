"""Experts, text encoders and VAEs: each quantized by its own recipe, in one report, saved and opened again by stock diffusers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderKLLTXVideo, AutoencoderKLTemporalDecoder, DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, T5Config, T5EncoderModel

import reelquant
from reelquant._errors import CalibrationError, RecipeError, SiteError, UnsupportedError
from reelquant.clock import NAME
from reelquant.discover import kind_of_component
from reelquant.engine import run as engine
from reelquant.engine.components import assign
from reelquant.engine.report import Report
from reelquant.models.parts import cosines, decibels, fitting_clip, moving_clip, round_trip
from reelquant.models.sampling import sample
from reelquant.nn import QuantConv3d, quantized_class, quantized_layers
from tests.tiny.stock import CALL, PROMPTS, realigned, wan_pipeline

SMALL = {"calibrate.prompts": 2, "search.prompts": 1, "search.steps": 3}
STEPS = CALL | {"num_inference_steps": 4}
TEXTS = [*PROMPTS, "a red box", "a ball"]
CHOICE: dict[str, Any] = {
    "name": "choice",
    "defaults": {"weight": {"format": "int8", "granularity": "channel"}, "input": {"format": "uint8"}},
    "calibrate": {"prompts": 1},
    "steps": [{"transform": "range_integrate", "power": [0.5, 1.0], "on": "role:main"}],
}
PARTS = ("transformer", "transformer_2", "text_encoder", "vae")


def experts(boundary: float = 0.5) -> Any:
    """A Wan 2.2 pipeline: one denoiser for high noise, another for low noise."""
    pipe = wan_pipeline()
    second = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.1)
    pipe.register_modules(transformer_2=second)
    pipe.register_to_config(boundary_ratio=boundary)
    return pipe


def quantize(pipe: Any, recipe: Any, **options: Any) -> Report:
    return reelquant.quantize(pipe, recipe, TEXTS, overrides=SMALL, **{**STEPS, **options})


def clip(pipe: Any) -> torch.Tensor:
    for name in PARTS:
        if getattr(pipe, name, None) is not None:
            realigned(getattr(pipe, name))
    pipe.set_progress_bar_config(disable=True)
    return sample(pipe, ["a red ball"], **STEPS)


@pytest.fixture(scope="module")
def everything() -> tuple[Any, Report]:
    """All four components of a Wan 2.2 pipeline quantized."""
    pipe = experts()
    return pipe, quantize(pipe, {"transformer": "qvd-w8a8", "transformer_2": "qvd-w4a8"}, components=["text_encoder", "vae"])


def test_every_expert_has_the_clock_of_its_own_part_of_the_trajectory(everything: tuple[Any, Report]) -> None:
    pipe, report = everything
    times = [getattr(pipe, name).get_submodule(NAME).timesteps.tolist() for name in ("transformer", "transformer_2")]
    assert times == [[1000.0, 667.0], [334.0, 1.0]] == [report.parts[name].timesteps for name in ("transformer", "transformer_2")]
    weights = [{layer.layout.weight.format for layer in quantized_layers(getattr(pipe, name)).values()} for name in PARTS[:2]]
    assert weights == [{"int8"}, {"int4"}]


def test_one_report_holds_the_parts_and_their_sum(everything: tuple[Any, Report]) -> None:
    pipe, report = everything
    assert list(report.parts) == list(PARTS) == report.component.split(", ")
    assert [part.recipe for part in report.parts.values()] == ["qvd-w8a8", "qvd-w4a8", "w8a16", "w8a16"]
    assert report.recipe == "qvd-w8a8, qvd-w4a8, w8a16"
    for name in ("bytes_float", "bytes_quantized", "bytes_model", "bytes_model_float"):
        assert getattr(report, name) == sum(getattr(part, name) for part in report.parts.values())
    named = {f"{part}.{layer}" for part in PARTS for layer in quantized_layers(getattr(pipe, part))}
    assert {record.name for record in report.layers} == named and sum(report.kernel.values()) == len(named)
    # the second expert is checked with the first one quantized already, and that is the figure of the whole
    psnr = [report.parts[name].latent_psnr for name in PARTS[:2]]
    assert psnr[0] > 45 and psnr[1] > 40 and report.latent_psnr == psnr[1]
    data = report.to_json()
    assert data["ratio"] == report.ratio > 3 and list(data["parts"]) == list(PARTS) and data["parts"]["vae"]["ratio"] > 3.5
    assert report.parts["vae"].by_component == {"vae": report.parts["vae"]}


def test_what_happens_to_prompts_and_clips_is_measured(everything: tuple[Any, Report]) -> None:
    pipe, report = everything
    assert 0.999 < report.figures["text_encoder.prompt_cosine_min"] <= report.figures["text_encoder.prompt_cosine"] < 1
    found = report.parts["vae"].figures["round_trip_psnr"]
    again = round_trip(wan_pipeline().vae, fitting_clip(pipe.vae)), round_trip(pipe.vae, fitting_clip(pipe.vae))
    assert 40 < found < 60 and found == pytest.approx(decibels(*again), abs=0.1)


def test_all_components_are_saved_and_opened_by_stock_diffusers(everything: tuple[Any, Report], tmp_path: Path) -> None:
    pipe, report = everything
    reelquant.save(pipe, tmp_path / "out", report)
    again = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert [len(quantized_layers(getattr(again, name))) for name in PARTS] == [len(report.parts[name].layers) for name in PARTS]
    assert again.config.boundary_ratio == 0.5 and torch.equal(clip(again), clip(pipe))


def test_causal_convolutions_keep_their_own_forward(everything: tuple[Any, Report]) -> None:
    """Those of Wan pad in time and take frames from a cache before they reach the stock forward."""
    pipe, _ = everything
    vae = copy.deepcopy(pipe.vae)
    layer = vae.decoder.mid_block.resnets[0].conv1
    original = type(wan_pipeline().vae.decoder.mid_block.resnets[0].conv1)
    assert isinstance(layer, original) and isinstance(layer, QuantConv3d) and type(layer) is quantized_class(original(4, 4, 3, padding=1))
    x, cache = torch.randn(1, layer.in_channels, 3, 4, 4), torch.randn(1, layer.in_channels, 2, 4, 4)
    x[:, :, 0], cached = x[:, :, 0], layer(x, cache)
    assert torch.equal(layer(torch.cat([cache, x], 2))[:, :, 2:], cached)
    before = round_trip(vae, moving_clip(5, 16))
    float_again = vae.dequantize()
    assert {type(module) for module in float_again.modules() if isinstance(module, nn.Conv3d)} == {original}
    assert decibels(before, round_trip(float_again, moving_clip(5, 16))) > 100


def test_one_recipe_serves_all_denoisers() -> None:
    pipe = experts()
    report = quantize(pipe, "minmax-w8a8")
    assert list(report.parts) == ["transformer", "transformer_2"] and not quantized_layers(pipe.vae)
    assert [part.recipe for part in report.parts.values()] == ["minmax-w8a8"] * 2


def test_both_experts_are_observed_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, passes = experts(), []
    original = engine.calibrate_together

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(len(args[1]))
        return original(*args, **kwargs)

    monkeypatch.setattr(engine, "calibrate_together", counted)
    quantize(pipe, {"transformer": "minmax-w8a8", "transformer_2": "minmax-w6a6"})
    assert passes == [2]


def test_an_expert_that_is_never_called_is_told_and_nothing_is_changed() -> None:
    pipe = experts(boundary=0.0)
    with pytest.raises(CalibrationError, match="never called"):
        quantize(pipe, "minmax-w8a8")
    assert not quantized_layers(pipe.transformer) and not quantized_layers(pipe.transformer_2)


def test_a_failure_in_the_last_component_leaves_all_of_them_float(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = experts()
    before = clip(pipe)
    original = engine._check

    def check(session: Any, *rest: Any) -> None:
        if session.component == "vae":
            raise KeyboardInterrupt
        original(session, *rest)

    monkeypatch.setattr(engine, "_check", check)
    with pytest.raises(KeyboardInterrupt):
        quantize(pipe, "minmax-w8a8", components=["transformer", "transformer_2", "vae"])
    assert not any(quantized_layers(getattr(pipe, name)) for name in PARTS)
    assert torch.equal(clip(pipe), before)


def test_patterns_of_the_user_count_in_the_component_that_has_them() -> None:
    pipe = wan_pipeline()
    plans = reelquant.api.plans(pipe, "w8a16", components=["transformer", "vae"], skip=["blocks.0", "decoder.mid_block"])
    assert plans["transformer"].layers["blocks.0.ffn.net.2"].skipped == "skipped by you (blocks.0)"
    assert plans["vae"].layers["decoder.mid_block.resnets.0.conv1"].skipped == "skipped by you (decoder.mid_block)"
    either = reelquant.api.plans(pipe, "w8a16", components=["transformer", "vae"], skip=["blocks.0 | decoder.mid_block"])
    assert all({row.layer.name for row in either[name].skipped} == {row.layer.name for row in plans[name].skipped} for name in plans)
    with pytest.raises(SiteError, match="'nothing' matches none"):
        reelquant.api.plans(pipe, "w8a16", components=["transformer", "vae"], skip=["nothing"])


@pytest.mark.parametrize(
    ("recipe", "components", "kind", "message"),
    [
        ({"transformer": "w8a16", "unet": "w8a16"}, None, RecipeError, "'unet' is not a component of WanPipeline"),
        ({"transformer": "w8a16"}, ["transformer_2"], RecipeError, "component 'transformer_2' has no recipe"),
        ({"text_encoder": "qvd-w8a8"}, None, RecipeError, "component 'text_encoder' .* has none; give it one that needs no data"),
        (
            {"vae": "brecq-w4a8"},
            None,
            RecipeError,
            "'brecq-w4a8' does not suit component 'vae' .*'adaround' of it works on calls of a denoiser",
        ),
        (
            {"vae": CHOICE},
            None,
            RecipeError,
            "'choice' does not suit component 'vae' .*'range_integrate' of it is chosen by sampling latents",
        ),
        ("w8a16", ["tokenizer"], UnsupportedError, "no component 'tokenizer'"),
        ("w8a16", ["ve"], UnsupportedError, "did you mean 'vae'"),
    ],
)
def test_what_cannot_be_assigned(recipe: Any, components: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        assign(experts(), recipe, components)


def vaes() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    down3, up3 = ("CogVideoXDownBlock3D",) * 2, ("CogVideoXUpBlock3D",) * 2
    return {
        "pictures": AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2),
        "svd": AutoencoderKLTemporalDecoder(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2),
        "cogvideox": AutoencoderKLCogVideoX(block_out_channels=(8, 8), down_block_types=down3, up_block_types=up3, norm_num_groups=4,
                                            layers_per_block=1, latent_channels=4, temporal_compression_ratio=2),
        "ltx": AutoencoderKLLTXVideo(latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
                                     layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1)),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["pictures", "svd", "cogvideox", "ltx"])
def test_vaes_of_pictures_and_clips(name: str) -> None:
    pipe = wan_pipeline()
    pipe.vae = vaes()[name].eval()
    pipe.components["vae"] = pipe.vae
    report = reelquant.quantize(pipe, "w8a16", components=["vae"])
    convolutions = sum(isinstance(module, nn.Conv2d | nn.Conv3d) for module in pipe.vae.modules())
    assert report.component == "vae" and len(report.layers) > 0.6 * convolutions, report.skipped
    assert report.figures["round_trip_psnr"] > 30 and report.latent_psnr is None


def text_encoders() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "T5": T5EncoderModel(T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)),
        "CLIP": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=16, max_position_embeddings=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
            )
        ),
        "LLM": LlamaModel(LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)),
    }


@pytest.mark.parametrize("name", ["T5", "CLIP", "LLM"])
def test_text_encoders(name: str) -> None:
    encoder = text_encoders()[name].eval()
    pipe = wan_pipeline()
    pipe.register_modules(text_encoder=encoder)
    with torch.no_grad():
        before = encoder(input_ids=torch.arange(8)[None]).last_hidden_state
    report = reelquant.quantize(pipe, {"text_encoder": "w8a16"}, prompts=TEXTS)
    linear = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    assert kind_of_component("text_encoder", encoder) == "text encoder" and len(report.layers) >= len(linear) - 2, report.skipped
    with torch.no_grad():
        cosine = cosines([before], [encoder(input_ids=torch.arange(8)[None]).last_hidden_state])
    assert float(cosine.min()) > 0.999 and report.figures["prompt_cosine_min"] > 0.999


def test_a_text_encoder_opens_again_from_a_folder_in_half_precision(tmp_path: Path) -> None:
    """Files of CLIP have a prefix that the model does not have; transformers writes it again where it has read it."""
    text_encoders()["CLIP"].save_pretrained(tmp_path / "float")
    weights = tmp_path / "float" / "model.safetensors"
    save_file(
        {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(weights).items()}, weights, {"format": "pt"}
    )
    encoder, pipe = CLIPTextModel.from_pretrained(tmp_path / "float").eval(), wan_pipeline()
    pipe.register_modules(text_encoder=encoder)
    reelquant.quantize(pipe, {"text_encoder": "w8a16"}, prompts=TEXTS)
    folder = reelquant.save(pipe, tmp_path / "out", dtype=torch.float16) / "text_encoder"
    again = CLIPTextModel.from_pretrained(folder, dtype=torch.float16)
    scales = {key: value for key, value in again.state_dict().items() if key.endswith("weight_scale")}
    assert scales and all(torch.equal(encoder.state_dict()[key], value) for key, value in scales.items())


def test_a_pipeline_without_encode_prompt_says_what_is_not_measured() -> None:
    pipe = wan_pipeline()
    pipe.encode_prompt = lambda prompt, picture: None
    report = reelquant.quantize(pipe, "w8a16", components=["text_encoder"])
    assert report.figures == {} and "also wants picture" in report.warnings[0]


def test_embeddings_are_compared_without_padding() -> None:
    a = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    b = torch.tensor([[[1.0, 1.0], [5.0, 5.0]]])
    assert cosines([a], [b]).tolist() == pytest.approx([0.5**0.5])
    assert decibels(torch.zeros(4), torch.full((4,), 0.2)) == pytest.approx(20.0) and decibels(torch.ones(3), torch.ones(3)) == 200


def test_of_convolutions_that_change_their_input_calibration_sees_what_they_multiply() -> None:
    pipe = wan_pipeline()
    stem = pipe.transformer.patch_embedding

    class Causal(type(stem)):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(10 * x)

    with torch.no_grad():
        stem.weight /= 10
    stem.__class__ = Causal
    overrides = SMALL | {"rules": []}
    report = reelquant.quantize(pipe, "minmax-w8a8", TEXTS, overrides=overrides, skip=["!patch_embedding"], **STEPS)
    assert [record.name for record in report.layers] == ["patch_embedding"] and isinstance(pipe.transformer.patch_embedding, Causal)
    assert report.latent_psnr is not None and report.latent_psnr > 50
    assert "_conv_forward" not in vars(pipe.transformer.patch_embedding)
