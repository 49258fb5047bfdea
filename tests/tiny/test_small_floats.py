"""Small floats and groups through a stock pipeline: quantized, saved, opened by stock ``from_pretrained``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import reelquant
from reelquant import UnsupportedError
from reelquant.formats import packed_width, parse_format
from reelquant.kernels.cpu import int16_groups
from reelquant.nn import QuantLayer, quantized_layers
from tests.tiny.stock import CALL, PROMPTS, frames, wan_pipeline

FORMATS = {"to_q": "e3m0", "to_k": "e1m2", "to_v": "e3m2", "to_out.0": "e2m3", "ffn.net.0.proj": "e3m4", "ffn.net.2": "e2m1"}
EVERY_FORMAT: dict[str, Any] = {
    "name": "every-small-float",
    "defaults": {"weight": {"format": "int8", "granularity": "channel"}, "input": None},
    "rules": [
        {"on": "role:entry | role:exit", "skip": True},
        *({"on": f"blocks.*.{place}", "weight": {"format": name, "granularity": "group-8"}} for place, name in FORMATS.items()),
    ],
    "calibrate": None,
}
RECIPES = {  # name -> numbers of weights and inputs of most layers, bits per weight with scales
    "nvfp4-w4a4": ("e2m1 group-16", "e4m3", 4.5),
    "mxfp4-w4a4": ("e2m1 group-32", "e8m0", 4.25),
    "mxfp8-w8a8": ("e4m3 group-32", "e8m0", 8.25),
}


def reopened(pipe: Any, folder: Path, **options: Any) -> Any:
    other = DiffusionPipeline.from_pretrained(reelquant.save(pipe, folder), **options)
    other.set_progress_bar_config(disable=True)
    return other


def assert_same_layers(one: Any, other: Any) -> None:
    first, second = quantized_layers(one.transformer), quantized_layers(other.transformer)
    assert first.keys() == second.keys()
    for name, layer in first.items():
        state, found = layer.state_dict(), second[name].state_dict()
        assert state.keys() == found.keys() and second[name].layout == layer.layout
        assert all(key == "bias" or (found[key].dtype == state[key].dtype and torch.equal(found[key], state[key])) for key in state), name


def test_every_small_float_comes_back_bit_equal(tmp_path: Path) -> None:
    pipe = wan_pipeline()
    reelquant.quantize(pipe, EVERY_FORMAT)
    layers = quantized_layers(pipe.transformer)
    assert {layer.layout.weight.format for layer in layers.values()} == {"int8", *FORMATS.values()}
    for layer in layers.values():
        width, bits = layer.weight_shape[1], parse_format(layer.layout.weight.format).bits
        assert layer.weight.shape[1] == packed_width(width, bits) and layer.weight.dtype.itemsize == 1
    other = reopened(pipe, tmp_path / "out")
    assert_same_layers(pipe, other)
    assert torch.equal(frames(other), frames(pipe))


def assert_takes(layer: QuantLayer, bits: float) -> None:
    """A layer of whole groups takes its codes, a byte for each group, and a number for the tensor if there is one, besides its bias."""
    out, width = layer.weight_shape
    assert width % int(layer.layout.weight.granularity.partition("-")[2]) == 0
    held = sum(value.numel() * value.element_size() for key, value in layer.state_dict().items() if key != "bias")
    assert held == bits * out * width / 8 + (4 if layer.layout.weight.scale == "e4m3" else 0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_in_groups_come_back_bit_equal_and_say_what_is_simulated(recipe: str, tmp_path: Path) -> None:
    pipe = wan_pipeline()
    reference, report = frames(pipe), reelquant.quantize(pipe, recipe, PROMPTS, **CALL)
    numbers, scale, bits = RECIPES[recipe]
    grouped = {name: layer for name, layer in quantized_layers(pipe.transformer).items() if layer.layout.weight.scale != "float"}
    roles = {record.name: record.role for record in report.layers}
    last = f"blocks.{len(pipe.transformer.blocks) - 1}." if recipe == "nvfp4-w4a4" else "no layer"
    assert grouped.keys() == {name for name, role in roles.items() if role == "main" and not name.startswith(last)}
    for layer in grouped.values():
        for part in (layer.layout.weight, layer.layout.input):
            assert part is not None and (f"{part.format} {part.granularity}", part.scale) == (numbers, scale)
    assert_takes(grouped["blocks.0.ffn.net.2"], bits)
    multiplied = numbers.startswith("e2m1") and int16_groups.available() is None  # numbers of e4m3 are not multiples of one
    assert report.simulated != multiplied and report.kernel["int16 groups" if multiplied else "reference"] >= len(grouped)
    assert any(f"{numbers} {scale} scales" in record.weight for record in report.layers)
    clip = frames(pipe)
    assert bool(clip.isfinite().all()) and not torch.equal(clip, reference)
    other = reopened(pipe, tmp_path / "out")
    assert_same_layers(pipe, other)
    assert torch.equal(frames(other), clip)
    narrow = reopened(pipe, tmp_path / "again", dtype=torch.bfloat16)
    assert_same_layers(pipe, narrow)


def test_graphs_and_exporters_refuse_them_in_one_sentence(tmp_path: Path) -> None:
    pipe = wan_pipeline()
    reelquant.quantize(pipe, "nvfp4-w4a4", PROMPTS, **CALL)
    why = "has inputs with a scale per group of channels, scales of eight bits"
    with pytest.raises(UnsupportedError, match=f"'blocks.0.*' {why}"):
        reelquant.export(reelquant.save(pipe, tmp_path / "out"), "torchao", tmp_path / "exported")
    pytest.importorskip("openvino")
    with pytest.raises(UnsupportedError, match=f"does not run as an OpenVINO graph: 'blocks.0.*' {why}"):
        reelquant.configure(pipe, runtime="openvino")
