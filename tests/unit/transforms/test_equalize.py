"""Ranges that move between the weights of two layers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

import reelquant
from reelquant._errors import RecipeError, UnsupportedError
from reelquant.formats import Int, QuantSpec, fit, parse_granularity
from reelquant.nn import quantized_layers
from reelquant.transforms import Equalize
from reelquant.transforms.equalize import Pair, factors, move
from tests.tiny.stock import CALL, PROMPTS, wan_pipeline


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    layer.weight.data = torch.tensor(weight)
    if bias is not None:
        layer.bias.data = torch.tensor(bias)
    return layer


def test_both_channels_meet_halfway_at_powers_of_two() -> None:
    """Channel 0: 16 before, 1 after, so a factor of 4. Channel 1 is dead and stays. Row 0 of the first layer does not count."""
    first, second = linear([[3.0, 3.0], [16.0, -2.0], [0.0, 0.0]], [1.0, 2.0, 3.0]), linear([[1.0, 5.0], [-0.5, 1.0]])
    pair = Pair(first, slice(1, 3), [second])
    assert factors(pair).tolist() == [4.0, 1.0]
    move(pair, factors(pair))
    assert first.weight.tolist() == [[3.0, 3.0], [4.0, -0.5], [0.0, 0.0]] and first.bias.tolist() == [1.0, 0.5, 3.0]
    assert second.weight.tolist() == [[4.0, 5.0], [-2.0, 1.0]]


def test_a_norm_is_a_layer_with_one_weight_for_each_channel() -> None:
    norm, second = nn.LayerNorm(2), linear([[0.25, 1.0]])
    norm.bias.data = torch.tensor([2.0, 2.0])
    pair = Pair(norm, slice(0, 2), [second])
    assert factors(pair).tolist() == [2.0, 1.0]
    move(pair, factors(pair))
    assert norm.weight.tolist() == [0.5, 1.0] and norm.bias.tolist() == [1.0, 2.0] and second.weight.tolist() == [[0.5, 1.0]]


def test_rounds_are_counted_from_one() -> None:
    with pytest.raises(RecipeError, match="rounds of 1 or more, got 0"):
        Equalize(rounds=0)


@torch.no_grad()
def test_uneven_channels_cost_a_shared_scale_its_precision_and_even_ones_do_not() -> None:
    """Channels over seven powers of two, as in DFQ's example; 8 bits for the whole weight of both layers."""
    torch.manual_seed(0)
    first, second, x = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False), torch.randn(256, 32)
    uneven = torch.linspace(-3, 4, 32).round().exp2()
    move(Pair(first, slice(0, 32), [second]), uneven)
    expected = second(first(x))

    def error() -> float:
        spec = QuantSpec(Int(8), parse_granularity("tensor"))
        rounded = [fit(spec, layer.weight.detach())(layer.weight.detach()) for layer in (first, second)]
        return 10 * math.log10(float((x @ rounded[0].T @ rounded[1].T - expected).square().mean() / expected.square().mean()))

    before = error()
    pair = Pair(first, slice(0, 32), [second])
    move(pair, factors(pair))
    torch.testing.assert_close(second(first(x)), expected, rtol=1e-5, atol=1e-6)
    assert error() < before - 10


@torch.no_grad()
def test_nothing_is_left_to_store(tmp_path: Path) -> None:
    """The quantized layers have the tensors of plain ones, and stock diffusers opens them."""
    pipe, plain = wan_pipeline(), wan_pipeline()
    float_value = pipe.transformer.blocks[0].attn1.to_v.weight
    float_value[0] *= 16
    float_value = float_value.clone()
    reelquant.quantize(pipe, "dfq-w8a8", PROMPTS, **CALL)
    reelquant.quantize(plain, {"extends": "dfq-w8a8", "name": "plain", "steps": []}, PROMPTS, **CALL)
    moved = pipe.transformer.blocks[0].attn1.to_v.dequantized_weight()
    assert float((moved - float_value).abs().amax()) > 0.1 * float(float_value.abs().amax())
    assert {name: value.shape for name, value in pipe.transformer.state_dict().items()} == {
        name: value.shape for name, value in plain.transformer.state_dict().items()
    }
    reelquant.save(pipe, tmp_path / "out")
    opened = WanTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    for name, layer in quantized_layers(opened).items():
        assert torch.equal(layer.codes, pipe.transformer.get_submodule(name).codes)


def test_a_failed_run_leaves_the_float_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = wan_pipeline()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr("reelquant.engine.session.Session.build", fail)
    with pytest.raises(RuntimeError, match="stop"):
        reelquant.quantize(pipe, "dfq-w8a8", PROMPTS, **CALL)
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())


def test_loading_layer_by_layer_is_refused(tmp_path: Path) -> None:
    wan_pipeline().transformer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="'dfq-w8a8' cannot be followed while weights are loaded"):
        WanTransformer3DModel.from_pretrained(tmp_path, quantization_config=reelquant.ReelQuantConfig("dfq-w8a8"))
