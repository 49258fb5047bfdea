"""A denoiser for which no inputs can be made up: what quantizes while loading quantizes in memory and from disk to disk, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel

import reelquant
from reelquant import ReelQuantConfig, UnsupportedError
from reelquant.nn import quantized_layers

CALL: dict[str, Any] = dict(num_inference_steps=2, num_frames=5, height=32, width=32)
RECIPE = {
    "name": "static",
    "defaults": {"weight": {"format": "int8", "granularity": "channel"}, "input": {"format": "int8"}},
    "calibrate": {"prompts": 1, "steps": 2},
}


def pipeline() -> Any:
    tiny = reelquant.open_pipeline("tiny-dit")
    torch.manual_seed(0)
    model = AnyFlowTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=8, out_channels=8, text_dim=64, freq_dim=32, ffn_dim=32, num_layers=2,
        rope_max_seq_len=32,
    ).eval()  # fmt: skip
    parts = {name: tiny.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    return AnyFlowPipeline(transformer=model, **parts)


def test_data_free_recipes_give_the_same_layers_on_all_ways(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "float")
    wish = ReelQuantConfig("w8a16")
    loaded = AnyFlowTransformer3DModel.from_pretrained(tmp_path / "float" / "transformer", quantization_config=wish)
    reelquant.quantize_folder(tmp_path / "float", tmp_path / "disk", "w8a16")
    reelquant.quantize(pipe, "w8a16")
    expected = {name: layer.layout for name, layer in quantized_layers(loaded).items()}
    assert expected
    for model in (pipe.transformer, reelquant.load(tmp_path / "disk").transformer):
        assert {name: layer.layout for name, layer in quantized_layers(model).items()} == expected


def test_recipes_that_calibrate_look_at_a_call_of_the_pipeline() -> None:
    pipe = pipeline()
    report = reelquant.quantize(pipe, RECIPE, ["a red circle"], **CALL)
    assert report.latent_psnr is not None and report.latent_psnr > 20
    assert {row.layer.role for row in reelquant.plan(pipeline(), "w8a16", inputs=call()).layers.values()} >= {"temporal", "prompt", "main"}


def test_inputs_that_the_message_names_are_taken() -> None:
    class Alone:
        """Cannot be called."""

        components: ClassVar[dict[str, Any]] = {}

    pipe = Alone()
    pipe.components = {"transformer": pipeline().transformer}
    with pytest.raises(UnsupportedError, match="pass inputs= with the arguments of one real call; nor did Alone get as far"):
        reelquant.plan(pipe, RECIPE)
    assert reelquant.plan(pipe, RECIPE, inputs=call()).quantized
    assert reelquant.plan(pipe, RECIPE, inputs={"transformer": call()}).quantized


def call() -> dict[str, Any]:
    noise = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 2, 8, 4, 4, generator=noise),
        "timestep": torch.full((1, 2), 500.0),
        "r_timestep": torch.full((1, 2), 400.0),
        "encoder_hidden_states": torch.randn(1, 6, 64, generator=noise),
        "return_dict": False,
    }
