from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from reelquant._errors import RecipeError, SiteError, UnsupportedError
from reelquant.engine.plan import Plan, make_plan
from reelquant.recipes.recipe import load_recipe
from reelquant.sites import DenoiserMap, Group, Layer, Role

INT8 = {"format": "int8", "granularity": "channel"}
ROLES: dict[str, Role] = {"first": "entry", "time": "temporal", "text": "prompt", "block.a": "main", "block.b": "main", "last": "exit"}


def model() -> nn.Module:
    parts = {"first": nn.Conv2d(4, 8, 1), "time": nn.Linear(8, 8), "text": nn.Linear(8, 8), "last": nn.Linear(8, 4)}
    return nn.ModuleDict(parts | {"block": nn.ModuleDict({"a": nn.Linear(8, 16), "b": nn.Linear(16, 8, bias=False)})})


def map_of(denoiser: nn.Module, **orders: int) -> DenoiserMap:
    layers = {}
    for order, (name, role) in enumerate(ROLES.items()):
        module = denoiser.get_submodule(name)
        axis = 1 if isinstance(module, nn.Conv2d) else -1
        kind, shape = type(module).__name__, tuple(module.weight.shape)
        layers[name] = Layer(name, kind, role, frozenset(), shape, (), axis, 1, orders.get(name, order))
    return DenoiserMap("Model", layers, tuple(Group((name,), layer.role) for name, layer in layers.items()))


def plan(skip: Any = (), denoiser: nn.Module | None = None, orders: Any = None, **recipe: Any) -> Plan:
    denoiser = denoiser or model()
    data = {"name": "mine", "defaults": {"weight": INT8, "input": {"format": "uint8"}}} | recipe
    return make_plan(load_recipe(data), map_of(denoiser, **(orders or {})), denoiser, skip)


def test_later_rules_win_key_by_key() -> None:
    found = plan(rules=[
        {"on": "block", "weight": {"format": "int4", "granularity": "group-8"}, "input": None},
        {"on": "block.b", "input": {"format": "int6"}},
        {"on": "role:entry | role:exit", "keep": True, "because": "ends"},
        {"on": "last", "keep": False},
    ]).layers  # fmt: skip
    assert str(found["block.a"].weight) == "int4 group-8" and found["block.a"].input is None
    assert str(found["block.b"].weight) == "int4 group-8" and str(found["block.b"].input) == "int6 tensor"
    assert str(found["time"].weight) == "int8 channel" and found["first"].skipped == "ends"
    assert found["last"].skipped is None  # a later rule takes a skip back


def test_reasons_to_stay() -> None:
    class Own(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    denoiser = model()
    denoiser["text"] = Own(8, 8)
    denoiser["first"] = nn.Conv2d(4, 8, 1, groups=2)
    found = plan(["block.a"], denoiser, {"time": -1}, rules=[{"on": "last", "keep": True}]).layers
    assert found["first"].skipped == "Conv2d has no quantized form" and found["time"].skipped == "never called by the sampler"
    assert found["text"].skipped == "Own has no quantized form" and found["last"].skipped == "skipped by rule 'last'"
    assert found["block.a"].skipped == "skipped by you (block.a)" and found["block.b"].skipped is None


def test_skips_add_to_the_rules_and_may_name_what_others_have() -> None:
    found = plan(["time", "class:Conv2d"], rules=[{"on": "last", "keep": True}]).layers
    assert {name for name, row in found.items() if row.skipped} == {"time", "first", "last"}
    assert plan(["time | elsewhere"]).layers["time"].skipped == "skipped by you (time | elsewhere)"


@pytest.mark.parametrize("place", ["rules", "steps"])
@pytest.mark.parametrize(("pattern", "message"), [
    ("blok.a", r"did you mean 'block.a'\?"), ("role:main & blok.a", "matches none"), ("role:mian", r"did you mean 'main'\?"),
    ("re:[", "is not a regular expression"),
])  # fmt: skip
def test_unknown_patterns_are_errors(place: str, pattern: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        plan(**{place: [{"on": pattern, **({"keep": True} if place == "rules" else {"transform": "shift"})}]})


def test_a_role_that_a_model_does_not_have_is_no_error() -> None:
    assert plan(rules=[{"on": "role:constant", "keep": True}]).quantized


def test_quantizing_nothing_is_an_error_that_says_why() -> None:
    with pytest.raises(
        RecipeError, match=r"'mine' quantizes none of the 6 layers of Model; they stay because: all; skipped by you \(block\)"
    ):
        plan(["block"], rules=[{"on": "!block", "keep": True, "because": "all"}])


INPUTS = {  # what is wrong -> an input, and the message
    "groups": ({"format": "int8", "granularity": "group-8"}, "scales per group of an input are found at run time; add dynamic: true"),
    "static tokens": ({"format": "int8", "granularity": "token"}, "add dynamic: true"),
    "static samples": ({"format": "int8", "granularity": "sample"}, "scales per sample of an input are found at run time"),
    "dynamic steps": ({"format": "int8", "dynamic": True, "slots": "per_step"}, "drop 'slots'"),
    "dynamic parameters": ({"format": "int8", "dynamic": True, "range": {"name": "mse", "p": 2.0}}, "own parameters"),
    "dynamic choice": ({"format": ["int8", "power_8"], "dynamic": True}, "takes one format"),
    "a choice per step": ({"format": ["int8", "power_8"], "slots": "per_step"}, "look at all steps at once"),
    "compared steps, per step": ({"format": "int8", "range": "criterion", "slots": "per_step"}, "look at all steps at once"),
    "samples per frame": ({"format": "int8", "range": "mse", "granularity": "frame-4"}, "work per tensor"),
    "samples per channel": ({"format": "int8", "range": "mse", "granularity": "channel"}, "work per tensor"),
}
WEIGHTS = {
    "tokens": ({"format": "int8", "granularity": "token"}, "'first': a weight has no tokens"),
    "samples": ({"format": "int8", "granularity": "sample"}, "'first': a weight has no samples"),
    "frames": ({"format": "int8", "granularity": "frame-4"}, "a weight has no frames"),
    "dynamic": (INT8 | {"dynamic": True}, "drop 'dynamic'"),
    "per step": (INT8 | {"slots": "per_step"}, "drop 'dynamic' and 'slots'"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_that_cannot_be_computed_are_refused_before_calibration(case: str) -> None:
    given, message = INPUTS[case]
    with pytest.raises(UnsupportedError, match=message):
        plan(defaults={"weight": INT8, "input": given})


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_cannot_be_computed_are_refused_before_calibration(case: str) -> None:
    given, message = WEIGHTS[case]
    with pytest.raises(UnsupportedError, match=message):
        plan(defaults={"weight": given})


def test_static_inputs_without_calibration_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"no calibration, so static inputs of 'first' cannot be ranged; set dynamic: true"):
        plan(calibrate=None)
    assert plan(calibrate=None, defaults={"weight": INT8, "input": {"format": "uint8", "dynamic": True}}).quantized


def test_two_solvers_for_one_layer_are_an_error() -> None:
    with pytest.raises(RecipeError, match=r"layer 'block.a' gets two 'solve' steps, \[0, 1\] of the recipe"):
        plan(steps=[{"solve": "gptq", "on": "role:main"}, {"solve": "nearest", "on": "block.a"}])


def test_sizes_before_and_after() -> None:
    rows = plan(defaults={"weight": {"format": "int4", "granularity": "group-8"}}).layers
    assert rows["block.a"].bytes_before == (16 * 8 + 16) * 4
    assert rows["block.a"].bytes_after == 16 * 4 + 16 * 2 + 16 * 4  # codes, one bfloat16 scale a row, bias
    assert rows["block.b"].bytes_after == 8 * 8 + 8 * 2 * 2


def test_steps_apply_where_on_says_and_axes_are_those_of_the_layer() -> None:
    found = plan(steps=[{"transform": "shift", "on": "role:main"}, {"solve": "gptq", "on": "block.b"}]).layers
    positions = {name: [entry.position for entry in row.entries] for name, row in found.items()}
    assert positions["block.a"] == [0] and positions["block.b"] == [0, 1] and positions["time"] == []
    assert found["first"].input.granularity.axis == 1 and found["time"].input.granularity.axis == -1


def test_a_stage_asks_for_statistics_by_what_comes_before_it_and_not_after() -> None:
    """A rotation at the front is of the raw input, whose rotated ranges are observed; one behind a shift is not."""
    needs = {}
    for order in (("rotate", "shift"), ("shift", "rotate")):
        rows = plan(steps=[{"transform": name, "on": "role:main"} for name in order]).layers
        needs[order] = rows["block.a"].needs
    assert "rotated" in needs["rotate", "shift"] and "rotated" not in needs["shift", "rotate"]
