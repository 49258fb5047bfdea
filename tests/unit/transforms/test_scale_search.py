"""Exponents by the error of outputs, and ranges of single steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from reelquant._errors import RecipeError, UnsupportedError
from reelquant.clock import Clock
from reelquant.formats import Int, QuantSpec, parse_granularity
from reelquant.sites import Layer
from reelquant.stages import GroupView, Rewrite, Specs, StageSite
from reelquant.streaming.estimate import _transforming
from reelquant.transforms import ScaleSearch
from reelquant.transforms.output_error import output_error
from tests.single import build, one_group, plan_of

WEIGHT = QuantSpec(Int(4), parse_granularity("channel"))
INPUT = QuantSpec(Int(4), parse_granularity("token", -1), dynamic=True)


def group(x: torch.Tensor, weight: torch.Tensor, weight_spec: QuantSpec = WEIGHT, input_spec: QuantSpec | None = INPUT) -> GroupView:
    layer = Layer("layer", "Linear", "main", frozenset({"latent"}), tuple(weight.shape))
    low, high = x.amin(0, keepdim=True), x.amax(0, keepdim=True)
    return GroupView(low, high, x.mean(0, keepdim=True), [weight], sites=(StageSite(layer, Specs(weight_spec, input_spec)),), rows=x)


def outliers() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(200, 16)
    x[:, 3] *= 40
    return x, torch.randn(8, 16)


def test_the_error_by_hand() -> None:
    """int4 with a range of 7: steps of one, so 7 and 2 are exact and 3.4 becomes 3."""
    view = group(torch.tensor([[7.0, 3.4]]), torch.tensor([[7.0, 2.0]]))
    assert output_error(view, Rewrite()) == pytest.approx((0.4 * 2) ** 2, rel=1e-3)  # bfloat16 scales of the weight are exact here
    scaled = Rewrite(scale=torch.tensor([1.0, 3.4 / 3]))
    assert output_error(view, scaled) == pytest.approx((3 * 2 - 3.4 * 2) ** 2, rel=1e-3)  # x' = 3 is exact; the weight 2.27 becomes 2
    as_float = replace(view, sites=(StageSite(view.sites[0].layer, Specs(WEIGHT, None)),))
    assert output_error(as_float, Rewrite()) == pytest.approx(0, abs=1e-6)


def test_a_shift_costs_nothing_and_moves_back() -> None:
    torch.manual_seed(0)
    view = group(
        torch.randn(200, 16) + 100,
        torch.randn(8, 16),
        QuantSpec(Int(8), parse_granularity("channel")),
        input_spec=QuantSpec(Int(8), parse_granularity("tensor", -1)),
    )
    assert output_error(view, Rewrite(shift=torch.full((16,), 100.0))) < output_error(view, Rewrite()) / 100


def test_the_choice_is_the_best_of_what_is_tried() -> None:
    x, weight = outliers()
    view = group(x, weight)
    search = ScaleSearch(grid=4, lone=True)
    errors = [output_error(view, Rewrite(scale=scale)) for scale in search._scales(view)]
    assert len(errors) == 5 + 4
    chosen = output_error(view, search.plan(view))
    assert chosen == min([*errors, output_error(view, Rewrite())]) < output_error(view, Rewrite()) / 2


def test_nothing_is_scaled_where_that_does_not_help() -> None:
    torch.manual_seed(0)
    x, weight = torch.randint(-7, 8, (64, 8)).float(), torch.randint(-7, 8, (4, 8)).float()
    x[:, 0], weight[:, 0] = 7, 7  # every token and row has its end: all is exact
    assert ScaleSearch(grid=10, lone=True).plan(group(x, weight)).identity


def test_directions_of_a_branch_stay_float() -> None:
    x, weight = outliers()
    view = group(x, weight, input_spec=None)
    full = output_error(view, Rewrite(scale=torch.rand(16) + 0.5), lambda shape: min(shape))
    assert full < 1e-6 * float((x @ weight.T).square().sum()) < output_error(view, Rewrite())


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
@pytest.mark.parametrize(
    "numbers",
    [
        {"format": "int4", "granularity": "group-4", "dynamic": True},
        {"format": "int4"},
        {"format": "int8", "slots": "per_step"},
        {"format": "int8", "granularity": "frame-2"},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_searched_scale_lowers_the_error_of_the_built_layer(kind: str, numbers: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module: nn.Module = nn.Linear(12, 8) if kind == "Linear" else nn.Conv2d(12, 8, 3, padding=1)
    shape = (64, 12) if kind == "Linear" else (2, 12, 6, 6)
    wide = torch.ones(12)
    wide[5] = 30.0
    calls = [torch.randn(shape) * (wide if kind == "Linear" else wide[:, None, None]) * size for size in (1, 3)]
    weight, frames = {"format": "int8", "granularity": "channel"}, 2 if "frame" in numbers.get("granularity", "") else 1

    def error(steps: list[dict[str, Any]]) -> float:
        layer = build(nn.ModuleDict({"layer": module}), ["layer"], calls, weight, numbers, steps, frames=frames).layers["layer"]
        layer.clock = (Clock([900.0, 100.0]),)
        layer.clock[0].tick(100.0)
        return float((layer(calls[1]) - module(calls[1])).square().mean())

    assert error([{"transform": "scale_search", "grid": 8}]) < error([]) / 2


@torch.no_grad()
def test_the_first_step_alone_may_say_how_channels_differ() -> None:
    first = torch.tensor([[8.0, 1.0], [-8.0, -1.0]])
    calls = [first, first.flip(1) * 2]
    model = nn.ModuleDict({"layer": nn.Linear(2, 3)})
    scales = {}
    for peak in ("all", "first", "mean", "weighted"):
        steps = [{"transform": "scale", "alpha": 1.0, "peak": peak}]
        built = build(model, ["layer"], calls, {"format": "int8", "granularity": "channel"}, {"format": "int8"}, steps)
        scale = built.layers["layer"].pre_quant_scale.float()
        scales[peak] = float(scale[0] / scale[1])
    assert scales["first"] == pytest.approx(8, rel=0.01)
    assert scales["all"] == pytest.approx(0.5, rel=0.01)  # 8 over 16
    assert scales["mean"] == pytest.approx((8 + 2) / (1 + 16), rel=0.01)
    assert scales["weighted"] == pytest.approx((8 + 2 * 2) / (1 + 2 * 16), rel=0.01)  # the second range is twice as wide


def test_the_memory_of_a_search_is_in_the_estimate() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(64, 32)})
    map_, weight = one_group(model, ("layer",)), {"format": "int4", "granularity": "channel"}
    plans = [plan_of(model, map_, weight, None, [step]) for step in ({"transform": "scale"}, {"transform": "scale_search"})]
    plain, searched = (next(iter(_transforming(plan).values())) for plan in plans)
    assert searched - plain == 4 * 4 * (32 * 64 + 1024 * (32 + 2 * 64))  # four copies of the weight, of rows in and out, float32


def test_ranges_of_single_steps_are_asked_for_where_they_are_known() -> None:
    model, scale = nn.ModuleDict({"layer": nn.Linear(8, 4)}), {"transform": "scale", "peak": "mean"}
    weight, map_ = {"format": "int8", "granularity": "channel"}, one_group(model, ("layer",))
    for rotate in ({"transform": "rotate", "always": True}, {"transform": "rotate", "signs": True}):
        plan_of(model, map_, weight, {"format": "int8"}, [scale, rotate])
    plan_of(model, map_, weight, {"format": "int8"}, [{"transform": "rotate", "always": True}, scale])
    with pytest.raises(UnsupportedError, match="peak: mean needs ranges of single steps"):
        plan_of(model, map_, weight, {"format": "int8"}, [{"transform": "rotate", "signs": True}, scale])


@pytest.mark.parametrize(("options", "message"), [({"grid": 0}, "grid"), ({"rank": -1}, "rank"), ({"share": 2.0}, "share")])
def test_parameters_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ScaleSearch(**options)
