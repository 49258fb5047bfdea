"""A product of rank one with a factor for every frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import nn

import reelquant
from reelquant._errors import RecipeError, UnsupportedError
from reelquant.branches import FrameRankOne
from reelquant.clock import Moment
from reelquant.kernels import Window
from reelquant.nn import quantized_layers
from tests.single import one_group, plan_of
from tests.tiny.stock import CALL, PROMPTS, wan_pipeline


def test_every_frame_has_its_factor() -> None:
    """Two clips of two frames, three tokens each, as blocks of tokens: the second frame's part counts three times."""
    branch = FrameRankOne(axis=1, inner=False, frames=2)
    tensors = {
        "frame_down": torch.tensor([[1.0, 2.0]]),
        "frame_up": torch.tensor([[1.0], [0.0], [-1.0]]),
        "frame_factor": torch.tensor([1.0, 3.0]),
    }
    x = torch.ones(2, 6, 2)
    found = branch.run(lambda given: torch.zeros(2, 6, 3), x, Moment(), tensors, None)
    assert found[0, 0].tolist() == [3.0, 0.0, -3.0] and found[1, 5].tolist() == [9.0, 0.0, -9.0]
    other = branch.run(lambda given: torch.zeros(1, 5, 3), x[:1, :5], Moment(), tensors, None)
    assert other[0, 0].tolist() == [6.0, 0.0, -6.0]  # a clip of another length gets the mean
    assert branch.weight(tensors, (3, 2)) is None


def test_a_convolution_slides_as_its_layer_does() -> None:
    torch.manual_seed(0)
    window = Window((2, 2), (1, 1, 1, 1), (1, 1))
    tensors = {"frame_down": torch.randn(1, 4, 3, 3), "frame_up": torch.randn(5, 1), "frame_factor": torch.tensor([0.5])}
    x = torch.randn(3, 4, 6, 6)
    found = FrameRankOne().run(lambda given: torch.zeros(3, 5, 3, 3), x, Moment(), tensors, window)
    weight = FrameRankOne().weight(tensors, (5, 4, 3, 3))
    assert weight is not None
    torch.testing.assert_close(found, F.conv2d(x, weight, stride=2, padding=1), rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    with pytest.raises(RecipeError, match="finds axis and frames itself"):
        FrameRankOne(frames=0)
    model = nn.ModuleDict({"layer": nn.Linear(8, 8)})
    steps = [{"branch": "frame_rank_one"}, {"branch": "frame_rank_one"}]
    with pytest.raises((RecipeError, UnsupportedError), match="of this kind already"):
        plan_of(model, one_group(model, ["layer"]), {"format": "int8"}, None, steps)


def recipe(**options: Any) -> dict[str, Any]:
    train = {"reconstruct": "scales", "scope": "model", "relation": 100.0, "branch_rate": 0.01, "rate": 0.01, "iterations": 40, "calls": 8}
    return {
        "extends": "q-vdit-w4a6",
        "name": "test",
        "defaults": {"weight": {"format": "int3"}},
        "calibrate": {"prompts": 2, "steps": 3},
        "steps": [{"branch": "frame_rank_one", "on": "role:main"}, {"solve": "nearest", "on": "*"}, train | {"on": "role:main"} | options],
    }


@torch.no_grad()
def test_trained_branches_and_scales_are_stored_and_opened_by_stock_diffusers(tmp_path: Path) -> None:
    pipe, plain = wan_pipeline(), wan_pipeline()
    report = reelquant.quantize(pipe, recipe(), PROMPTS, **CALL)
    reelquant.quantize(plain, recipe() | {"steps": recipe()["steps"][:2]}, PROMPTS, **CALL)
    assert not [warning for warning in report.warnings if "codes stay" in warning]
    before = quantized_layers(plain.transformer)
    for name, layer in quantized_layers(pipe.transformer).items():
        assert torch.equal(layer.codes, before[name].codes), name  # scales move, codes stay
    trained = [layer for layer in quantized_layers(pipe.transformer).values() if layer.layout.branches]
    assert all(layer.layout.branches[0].frames == 3 for layer in trained)
    assert any(float(layer.frame_up.abs().amax()) > 0 for layer in trained)
    assert any(not torch.equal(layer.frame_factor, torch.ones(3)) for layer in trained)
    reelquant.save(pipe, tmp_path / "out")
    opened = WanTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    states = pipe.transformer.state_dict(), opened.state_dict()
    assert list(states[0]) == list(states[1]) and all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    with pytest.raises(UnsupportedError, match="differs from frame to frame is not a weight"):
        reelquant.export(tmp_path / "out", "torchao", tmp_path / "torchao")
