"""Learned rounding: candidates and loss by hand, soft layers against the reference kernel, training, refusals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reelquant._errors import RecipeError, UnsupportedError
from reelquant.branches import BRANCHES, Branch, TensorSpec
from reelquant.clock import Clock
from reelquant.formats import Granularity, Int, MiniFloat, Quantizer
from reelquant.kernels import backend
from reelquant.nn import QuantLayer
from reelquant.reconstruct import AdaRound
from reelquant.reconstruct.adaround import undecided
from reelquant.reconstruct.between import Between, _Mixed, neighbours, pull, share
from reelquant.reconstruct.error import mean_error, output_error, split
from reelquant.reconstruct.soft import Fixed, SoftLayer, soften
from reelquant.sites import DenoiserMap, Layer, Role
from reelquant.stages import BlockWork, LayerWork, RecordedCall
from tests.single import one_group, plan_of
from tests.unit.reconstruct.pieces import INT4, Pieces, block

GPTQ = {"solve": "gptq", "correct_bias": True}


# ------------------------------------------------------------------------------------------------------------ candidates and start


def test_candidates_by_hand() -> None:
    quantizer = Quantizer(Int(3), Granularity("channel"), torch.tensor([0.5]))  # -2, -1.5 ... 1.5; codes 0 ... 7
    target = torch.tensor([[0.2, -0.2, 0.5, 9.0, -9.0, 0.2, 0.2]])
    start = torch.tensor([[4, 4, 5, 7, 0, 7, 1]], dtype=torch.uint8)
    # around the target: 0 and 0.5; -0.5 and 0; exactly 0.5; the last two levels; the first two; starts at 1.5 and -1.5, far away
    lower, upper = neighbours(quantizer, target, start)
    assert lower.tolist() == [[4, 3, 5, 6, 0, 6, 1]] and torch.equal(upper, lower + 1)


def test_candidates_on_a_grid_of_floats_by_hand() -> None:
    quantizer = Quantizer(MiniFloat(2, 1), Granularity("channel"), torch.tensor([1.0]))  # 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives
    target = torch.tensor([[0.2, -0.2, 2.6, -5.0, 9.0]])
    lower, upper = neighbours(quantizer, target, quantizer.codes(target))
    assert quantizer.dequantize(lower).tolist() == [[0.0, -0.5, 2.0, -6.0, 4.0]]
    assert quantizer.dequantize(upper).tolist() == [[0.5, 0.0, 3.0, -4.0, 6.0]]


@pytest.mark.parametrize("weight", ["int4", "uint4", "power_4", "int2", "e2m1", "e4m3"])
def test_without_training_the_starting_codes_come_back(weight: str) -> None:
    torch.manual_seed(0)
    for grain in ("channel", "group-8"):
        spec = {"format": weight, "granularity": grain}
        pieces = Pieces(nn.Linear(24, 16), [torch.randn(60, 24) @ torch.randn(24, 24)], spec, None, [GPTQ])
        layer = Between(pieces.built.layer, pieces.built.work)
        assert pieces.built.work.solution is not None
        assert torch.equal(layer.solution().values, pieces.built.work.solution.values), grain
        assert bool(((share(layer.v) >= 0) & (share(layer.v) <= 1)).all())


def test_the_soft_weight_starts_on_the_side_of_its_code() -> None:
    pieces = Pieces(nn.Linear(24, 16), [torch.randn(60, 24)], INT4, None, [{"solve": "nearest"}])
    layer = Between(pieces.built.layer, pieces.built.work)
    target = (pieces.built.work.matrix - layer.low) / (layer.high - layer.low)
    expected = torch.where(target > 0.5, target.clamp(min=0.9), target.clamp(max=0.1)).clamp(0, 1)
    torch.testing.assert_close(share(layer.v).detach(), expected, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------ the reference kernel


@dataclass(frozen=True)
class Doubled(Branch):
    """Adds twice the first channel to every output."""

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        return {"factor": TensorSpec((1,), torch.float32)}

    def run(self, inner: Any, x: Tensor, moment: Any, tensors: Any, window: Any) -> Tensor:
        return inner(x) + tensors["factor"] * x[..., :1]

    def weight(self, tensors: Any, shape: tuple[int, ...]) -> Tensor:
        weight = torch.zeros(shape)
        weight[:, 0] = tensors["factor"]
        return weight

    def split(self, layer: LayerWork) -> LayerWork:
        return layer.with_branch(self, {"factor": torch.tensor([2.0])}, layer.target - 0.01)


LINEAR, CONV = (nn.Linear, 12, 10), (nn.Conv2d, 12, 10, 3, 2, 1)
CASES: dict[str, tuple[Any, Any, Any, list[dict[str, Any]]]] = {
    "linear": (LINEAR, INT4, {"format": "uint8"}, [GPTQ]),
    "float input": (LINEAR, INT4, None, [GPTQ]),
    "dynamic input": (LINEAR, INT4, {"format": "int8", "granularity": "token", "dynamic": True}, [GPTQ]),
    "per step": (LINEAR, INT4, {"format": "int8", "slots": "per_step"}, [GPTQ]),
    "shift and scale": (LINEAR, INT4, {"format": "int8"}, [{"transform": "shift"}, {"transform": "scale"}, GPTQ]),
    "shift, bias not corrected": (LINEAR, INT4, {"format": "int8"}, [{"transform": "shift"}, {"solve": "nearest"}]),
    "rotated": (LINEAR, INT4, {"format": "int8"}, [{"transform": "rotate", "least": -100.0}, GPTQ]),
    "affine groups": (LINEAR, {"format": "uint3", "granularity": "group-8"}, {"format": "uint8"}, [GPTQ]),
    "convolution": (CONV, INT4, {"format": "uint8"}, [{"transform": "shift"}, GPTQ]),
    "branch": (LINEAR, INT4, {"format": "uint8"}, [{"branch": "doubled"}, GPTQ]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_hardened_layers_give_the_bits_of_the_reference_kernel(case: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BRANCHES, "doubled", Doubled)
    torch.manual_seed(1)
    (kind, *shape), weight, inputs, steps = CASES[case]
    calls = [3 + torch.randn(*((6, 12) if kind is nn.Linear else (2, 12, 5, 5))) * (1 + step) for step in range(3)]
    pieces = Pieces(kind(*shape, bias=bias), calls, weight, inputs, steps)
    clock = Clock([0.0, 1.0, 2.0])
    pieces.built.layer.clock = (clock,)
    weight = Between(pieces.built.layer, pieces.built.work)
    weight.v.data = torch.randn(weight.v.shape)  # codes that no solver chose
    soft = SoftLayer(pieces.built.layer, pieces.built.work, weight)
    layer = pieces.with_codes(replace(pieces.built.work, solution=soft.solution())).layer
    layer.clock = (clock,)
    for step, x in enumerate(calls):
        clock.tick(float(step))
        with backend("reference"):
            assert torch.equal(soft(x), layer(x))


@pytest.mark.parametrize("case", CASES)
def test_a_soft_layer_has_the_bias_of_its_values(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BRANCHES, "doubled", Doubled)
    torch.manual_seed(1)
    (kind, *shape), weight, inputs, steps = CASES[case]
    pieces = Pieces(kind(*shape), [3 + torch.randn(*((6, 12) if kind is nn.Linear else (2, 12, 5, 5)))], weight, inputs, steps)
    soft = SoftLayer(pieces.built.layer, pieces.built.work, Between(pieces.built.layer, pieces.built.work))
    soft.hard, values = False, torch.randn(pieces.built.work.matrix.shape)
    torch.testing.assert_close(soft._bias(values), pieces.built.work.bias_for(values))


def test_the_input_gets_the_gradient_of_a_float_layer() -> None:
    pieces = Pieces(nn.Linear(6, 4), [torch.randn(9, 6)], INT4, {"format": "int8"}, [{"solve": "nearest"}])
    soft = SoftLayer(pieces.built.layer, pieces.built.work, Fixed.of(pieces.built.layer, pieces.built.work))
    x = torch.randn(3, 6, requires_grad=True)
    soft(x).sum().backward()
    torch.testing.assert_close(x.grad, soft.weight.values(hard=True).sum(0).expand(3, 6))


# ------------------------------------------------------------------------------------------------------------------- loss and parts


def test_errors_by_hand() -> None:
    wanted = (torch.tensor([0.0, 2.0]), "word", torch.tensor([1, 2]), [torch.tensor([0.0, 4.0])])
    found = (torch.tensor([1.0, 2.0]), "word", torch.tensor([9, 9]), [torch.tensor([2.0, 4.0])])
    assert float(output_error(found, wanted)) == pytest.approx((0.5 / 1 + 2 / 4) / 2)  # integers and words do not count


def test_every_fourth_call_is_held_out() -> None:
    assert split(9) == ([1, 2, 3, 5, 6, 7], [8, 4, 0])
    assert split(1) == ([], [0]) and split(0) == ([], [])


def test_the_regularizer_by_hand() -> None:
    pieces = Pieces(nn.Linear(2, 2), [torch.randn(9, 2)], INT4, None, [{"solve": "nearest"}])
    layer = Between(pieces.built.layer, pieces.built.work)
    layer.v.data = torch.tensor([[0.0, 9.0], [-9.0, float(torch.logit(torch.tensor((0.75 + 0.1) / 1.2)))]])  # h: 0.5, 1, 0, 0.75
    soft = SoftLayer(pieces.built.layer, pieces.built.work, layer)
    assert undecided([soft], 2.0) == pytest.approx((1 + 0.75) / 4)


def test_the_exponent_falls_after_the_warm_up() -> None:
    stage = AdaRound(iterations=10, warmup=0.2)
    assert [stage.beta(iteration / 10) for iteration in (0, 1, 2, 6)] == [None, None, 20.0, 11.0]


def temporal_map(**roles: Role) -> DenoiserMap:
    layers = {name.replace("_0_", "."): role for name, role in roles.items()}
    return DenoiserMap("M", {n: Layer(n, "Linear", role, frozenset(), (2, 2)) for n, role in layers.items()}, (), ("blocks.0", "blocks.1"))


def test_scopes() -> None:
    map_ = temporal_map(time_0_embed_0_a="temporal", time_0_embed_0_b="temporal", time_0_text="prompt", proj="temporal", out="exit")
    assert list(AdaRound(scope="temporal").units(map_)) == ["time.embed", "proj"]
    assert list(AdaRound(scope="block").units(map_)) == ["blocks.0", "blocks.1"]
    assert list(AdaRound(scope="layer").units(map_)) == ["time.embed.a", "time.embed.b", "time.text", "proj", "out"]


# ------------------------------------------------------------------------------------------------------------------------ training


def test_training_lowers_the_error_on_held_out_calls() -> None:
    stage, start = AdaRound(iterations=100, calls=12), block()
    calls = start.calls(True)
    before = mean_error(start, calls, split(12)[1])
    trained, soft = soften(start, Between)
    stage.train(trained, list(soft.values()), calls, split(12)[0])
    assert mean_error(trained, calls, split(12)[1]) < 0.7 * before
    assert undecided(list(soft.values()), 2.0) < 0.1


def test_one_seed_gives_the_same_codes_and_the_result_names_its_solver() -> None:
    stage = AdaRound(iterations=60, calls=12)
    first, second = (stage.solve_block(block()) for _ in range(2))
    assert set(first) == {"first", "second"} and first["first"].solver == "adaround"
    assert all(torch.equal(first[name].codes, second[name].codes) for name in first)
    assert not torch.equal(first["first"].codes, block().layers["first"].solution.codes)


def test_codes_that_do_not_lower_the_error_are_dropped_with_a_warning() -> None:
    told: list[str] = []
    assert AdaRound(iterations=1, rate=1e-9).solve_block(block(warn=told.append)) == {}
    assert len(told) == 1 and "does not lower the error on held-out calls" in told[0]
    assert AdaRound().solve_block(block(count=1, warn=told.append)) == {}
    assert "fewer than 2 of 32 wanted calls" in told[1]


def test_a_part_may_be_a_layer() -> None:
    whole = block()
    layer = whole.module.get_submodule("first")
    assert isinstance(layer, QuantLayer)
    calls = [RecordedCall((call.args[0] + 0.5,), {}, None, 0) for call in whole.calls(True)]
    floats = whole.layers["first"]
    calls = [replace(call, output=call.args[0] @ floats.weight.T + floats.bias) for call in calls]
    alone = BlockWork("first", layer, {"": floats}, lambda quantized: calls)
    assert set(AdaRound(iterations=50, scope="layer").solve_block(alone)) == {""}


# ------------------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "blok"}, "unknown scope 'blok' of adaround"),
        ({"inputs": "both"}, "unknown inputs 'both'"),
        ({"calls": 3}, "calls of adaround is at least 4, got 3"),
        ({"iterations": 0}, "iterations of adaround is at least 1"),
        ({"rate": 0.0}, "rate > 0"),
        ({"warmup": 1.0}, "warmup in"),
        ({"drop": 1.0}, "drop of adaround is a share in"),
        ({"inputs": "mixed"}, "write drop: 0.5"),
        ({"follow": "step", "input_rate": 0.1}, "unknown follow 'step'"),
        ({"gradient": "clip"}, "unknown gradient 'clip'"),
    ],
)
def test_wrong_parameters(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        AdaRound(**options)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (INT4, {"scope": "temporal"}, "trains layers with role temporal, not 'main'; write on: role:temporal"),
    ],
)
def test_layers_are_refused_when_planning(weight: Any, options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UnsupportedError, match=message):
        plan_of(model, one_group(model, ["0"]), weight, None, [{"reconstruct": "adaround", **options}])


def test_gradients_of_the_soft_weight_and_of_the_regularizer_are_those_of_their_formulas() -> None:
    torch.manual_seed(0)
    v, low, high = torch.linspace(-6, 6, 25, requires_grad=True), torch.randn(25), 2 + torch.randn(25)
    h = (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
    found, wanted = _Mixed.apply(v, low, high), low + h * (high - low)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad((one * torch.arange(25)).sum(), v, retain_graph=True)[0] for one in (found, wanted)))
    for beta in (2.0, 3.7, 20.0):
        (expected,) = torch.autograd.grad((1 - (2 * h - 1).abs().pow(beta)).sum(), v, retain_graph=True)
        torch.testing.assert_close(pull(v, beta), expected)
