"""Wan 2.2 A14B: a pipeline with two experts, each with a recipe of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import PipelineQuantizationConfig, WanPipeline

from reelquant import ReelQuantConfig
from reelquant.nn import quantized_layers
from tests.tiny.configs import TINY
from tests.tiny.stock import CALL, PROMPTS, wan_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float pipeline whose experts take turns at half of the noise."""
    pipe, where = wan_pipeline(), tmp_path_factory.mktemp("experts")
    second = TINY["WanTransformer3DModel"]()
    with torch.no_grad():
        second.proj_out.bias.add_(0.5)  # an expert of its own
    pipe.register_modules(transformer_2=second)
    pipe.register_to_config(boundary_ratio=0.5)
    pipe.save_pretrained(where)
    return where


def test_two_experts_are_quantized_while_the_pipeline_loads_and_both_sample(folder: Path, tmp_path: Path) -> None:
    recipes = {"transformer": ReelQuantConfig("w8a16"), "transformer_2": ReelQuantConfig("w4a16")}
    pipe = WanPipeline.from_pretrained(folder, quantization_config=PipelineQuantizationConfig(quant_mapping=recipes))
    floats = WanPipeline.from_pretrained(folder)
    formats = {name: {str(layer.layout.weight.format) for layer in quantized_layers(getattr(pipe, name)).values()} for name in recipes}
    assert formats == {"transformer": {"int8"}, "transformer_2": {"int4", "int8"}}  # temporal layers of w4a16 have 8 bits
    calls = dict.fromkeys(recipes, 0)
    for name in recipes:
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    found, plain = (_clip(one) for one in (pipe, floats))
    assert all(calls.values())
    assert found.isfinite().all()
    assert not torch.equal(found, plain)
    assert (found - plain).abs().mean() < 0.2 * plain.abs().mean()
    pipe.save_pretrained(tmp_path)
    again = WanPipeline.from_pretrained(tmp_path)
    assert torch.allclose(_clip(again), found, atol=1e-4)


def _clip(pipe: WanPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="latent", **CALL).frames
