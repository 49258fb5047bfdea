"""Frames that are mixed around a product, and the bits of their bands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import reelquant
from reelquant._errors import CheckpointError, RecipeError, UnsupportedError
from reelquant.engine.build import Context, GroupWork, _start, finish_layer
from reelquant.engine.choice import Choice
from reelquant.kernels import Arrangement, FrameBands, haar
from reelquant.nn import LayerLayout, TensorLayout, quantized_layers
from reelquant.observe import Call, FrameEnergy
from reelquant.transforms import MixFrames
from reelquant.transforms.mix_frames import allotted
from tests.single import one_group, plan_of
from tests.tiny.stock import CALL, PROMPTS, wan_pipeline

WEIGHT, TOKEN = {"format": "int8", "granularity": "channel"}, {"format": "int8", "granularity": "token", "dynamic": True}
MIXED = {
    "extends": "resq-w8a4",
    "name": "test",
    "calibrate": {"prompts": 2, "steps": 3},
    "steps": [{"transform": "mix_frames", "least": 0.0, "on": "role:main"}],
}


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 7, 8, 13, 21])
def test_the_transform_is_orthonormal(frames: int) -> None:
    matrix = haar(frames).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(frames, dtype=torch.float64), rtol=0, atol=1e-6)


def test_four_frames_by_hand() -> None:
    half = 2**-0.5
    assert torch.allclose(haar(4) @ torch.tensor([1.0, 3.0, 5.0, 9.0]), torch.tensor([9.0, -5.0, -2 * half, -4 * half]))
    assert torch.allclose(haar(3)[0], torch.tensor([0.5, 0.5, half]))  # the third frame waits for the mean of the first two


@pytest.mark.parametrize("arrangement", [Arrangement(0, True), Arrangement(0, False), Arrangement(1, True), Arrangement(1, False)], ids=str)
def test_a_mix_along_an_axis(arrangement: Arrangement) -> None:
    x = torch.randn(8, 12, 3)
    inner = arrangement.mixed(x, haar(4))
    rows = x.movedim(arrangement.axis, 0)
    rows = rows.unflatten(0, (-1, 4)) if arrangement.inner else rows.unflatten(0, (4, -1)).transpose(0, 1)
    expected = torch.einsum("fg,ng...->nf...", haar(4), rows)
    expected = (expected if arrangement.inner else expected.transpose(0, 1)).flatten(0, 1).movedim(0, arrangement.axis)
    torch.testing.assert_close(inner, expected)
    torch.testing.assert_close(arrangement.mixed(inner, haar(4).T), x)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_a_layer_computes_the_same_whatever_is_mixed(kind: str, bias: bool) -> None:
    """Eight bits in every band: only rounding differs from the float layer, and every frame has its bias once."""
    torch.manual_seed(0)
    module, x = (nn.Linear(6, 5, bias=bias), torch.randn(8, 12, 6)) if kind == "Linear" else (
        nn.Conv2d(6, 5, 3, padding=1, bias=bias), torch.randn(8, 6, 4, 4)
    )  # fmt: skip
    if bias:
        module.bias.data += 50  # would be spread over the frames if it were mixed
    plan = plan_of(nn.ModuleDict({"layer": module}), one_group(nn.ModuleDict({"layer": module}), ["layer"]), WEIGHT, TOKEN)
    for arrangement in (Arrangement(0, True), Arrangement(0, False), *([Arrangement(1, True)] if kind == "Linear" else [])):
        quantized = built(module, plan, FrameBands(arrangement, (8, 8, 8, 8)))
        error = (quantized(x) - module(x)).abs().amax() / (module(x) - module(x).mean()).abs().amax()
        assert float(error) < 0.03, arrangement
        assert quantized.simulated and "bands" in quantized.features
        odd = x[:7, :11] if kind == "Linear" else x[:7]
        assert float((quantized(odd) - module(odd)).abs().amax()) < 0.1  # a clip that does not fit is rounded as it is


def built(module: nn.Module, plan: Any, bands: FrameBands) -> Any:
    row = plan.layers["layer"]
    context = Context(plan, nn.ModuleDict({"layer": module}), {}, (), lambda name: module)
    work = replace(_start(context, GroupWork([row]), row, module), bands=bands)
    return finish_layer(GroupWork([row]), row, work, Choice.first(plan.entries), module).layer


def test_bits_go_where_the_error_is() -> None:
    assert allotted([1.0, 1.0, 1.0, 1.0], 4) == [4, 4, 4, 4]
    assert allotted([4096.0, 1.0, 1.0, 1.0], 4) == [7, 3, 3, 3]  # by hand: errors 4096 / 63^2 = 1.03 and 1 / 9 each
    assert sum(allotted([100.0, 3.0, 1.0], 4.4)) == 13  # 13.2 are there to spend


def energy(x: Tensor, frames: int, channel_axis: int = -1, *, convolves: bool = False) -> FrameEnergy:
    seen = FrameEnergy(channel_axis, convolves)
    seen.update(x, Call(0, frames=frames))
    return seen


@pytest.mark.parametrize(("axis", "inner"), [(0, True), (1, True), (1, False)])
def test_the_place_of_the_frames_is_found(axis: int, inner: bool) -> None:
    """Frames that are alike but for a hundredth, in the batch, alone in an axis beside others, or as blocks of tokens."""
    torch.manual_seed(0)
    still, noise = torch.randn(3, 1, 5, 6), torch.randn(3, 4, 5, 6)
    clip = still + noise / 100  # [clips, frames, tokens, channels]
    x = {(0, True): clip.flatten(0, 1), (1, True): clip.transpose(1, 2).flatten(0, 1), (1, False): clip.flatten(1, 2)}[axis, inner]
    found = MixFrames().choose(energy(x, 4).energies)
    assert (found.arrangement.axis, found.arrangement.inner or x.shape[axis] == 4) == (axis, inner)
    assert found.bits[0] == 8 and sum(found.bits) <= 16


def test_frames_that_have_nothing_in_common_are_left_alone() -> None:
    torch.manual_seed(0)
    assert MixFrames().choose(energy(torch.randn(2, 64, 32), 4).energies).bits == (4,)
    assert MixFrames().choose([]).bits == (4,)
    assert energy(torch.randn(8, 6, 4, 4), 4, 1, convolves=True).energies[0][0].axis == 0
    assert not energy(torch.randn(3, 6, 4, 4), 4, 1, convolves=True).energies  # a convolution may slide over the others


def test_refusals() -> None:
    for options in ({"bits": 1}, {"bits": 9}, {"least": 1.0}):
        with pytest.raises(RecipeError):
            MixFrames(**options)
    model = nn.ModuleDict({"layer": nn.Linear(8, 8)})
    with pytest.raises(UnsupportedError, match="int8 per token"):
        plan_of(model, one_group(model, ["layer"]), WEIGHT, {"format": "int8"}, [{"transform": "mix_frames"}])
    with pytest.raises(UnsupportedError, match="keep one"):
        plan_of(model, one_group(model, ["layer"]), WEIGHT, TOKEN, [{"transform": "mix_frames"}, {"transform": "mix_frames"}])
    steps = [{"transform": "mix_frames"}, {"reconstruct": "adaround", "scope": "layer", "on": "role:main"}]
    with pytest.raises(UnsupportedError, match="whose frames are mixed"):
        plan_of(model, one_group(model, ["layer"]), WEIGHT, TOKEN, steps)
    layout = LayerLayout(TensorLayout("int8", "channel"), bands=(0, 1, 6, 3))
    data = json.loads(json.dumps(layout.to_json()))
    assert LayerLayout.from_json(data) == layout
    for wrong in ([0, 1], [9, 1, 4], [0, 2, 4], [0, 1, 64], "words", [0, 1] + [4] * 300, 3):
        with pytest.raises(CheckpointError, match="frames are mixed in no known way"):
            LayerLayout.from_json(data | {"bands": wrong})


@torch.no_grad()
def test_a_saved_pipeline_opens_bit_equal(tmp_path: Path) -> None:
    pipe = wan_pipeline()
    reelquant.quantize(pipe, MIXED, PROMPTS, **CALL)
    mixed = [one for one in quantized_layers(pipe.transformer).values() if len(one.layout.bands) > 3]
    assert mixed
    reelquant.save(pipe, tmp_path / "out")
    opened = WanTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    config = pipe.transformer.config
    inputs = {
        "hidden_states": torch.randn(1, config.in_channels, 3, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, config.text_dim),
    }
    assert torch.equal(opened(**inputs)[0], pipe.transformer(**inputs)[0])
    assert {name: one.layout for name, one in quantized_layers(opened).items()} == {
        name: one.layout for name, one in quantized_layers(pipe.transformer).items()
    }
