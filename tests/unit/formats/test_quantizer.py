"""Specs, granularities and quantizers by hand; their laws are in tests/contracts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reelquant._errors import RecipeError
from reelquant.formats import (
    ByCriterion,
    FourOverSix,
    Granularity,
    Int,
    MinMax,
    Mse,
    Percentile,
    QuantSpec,
    RangeRule,
    bind,
    fit,
    parse_format,
    parse_granularity,
)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (QuantSpec(), "int8 tensor"),
        (QuantSpec(Int(4), Granularity("group", 64)), "int4 group-64"),
        (QuantSpec(parse_format("uint8"), Granularity("token"), dynamic=True), "uint8 token dynamic"),
        (QuantSpec(parse_format("e4m3"), slots="per_step"), "e4m3 tensor per step"),
        (
            QuantSpec(parse_format("uint6"), alternatives=(parse_format("log_uniform_6"), parse_format("power_6"))),
            "uint6|log_uniform_6|power_6 tensor",
        ),
    ],
)
def test_specs_print_what_a_plan_shows(spec: QuantSpec, text: str) -> None:
    assert str(spec) == text


@pytest.mark.parametrize("text", ["tensor", "channel", "group-64", "token", "sample", "frame-16"])
def test_granularities_print_as_they_are_read(text: str) -> None:
    assert str(parse_granularity(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chanel", r"unknown granularity 'chanel'; did you mean 'channel'\?"),
        ("group", "granularity 'group' needs a size, as in 'group-64'; got 0"),
        ("frame-0", "granularity 'frame' needs a size"),
        ("channel-4", "granularity 'channel' takes no size, got 'channel-4'"),
        ("group 64", "cannot read granularity 'group 64'; known: tensor, channel, group-64"),
        ("", "cannot read granularity ''"),
    ],
)
def test_a_granularity_that_cannot_be_read_is_an_error(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_granularity(text)


def test_units_are_counted_without_the_tensor() -> None:
    weight = torch.zeros(64, 96, 3, 3)
    for text in ("tensor", "channel", "group-100", "group-2000"):
        assert parse_granularity(text).units(tuple(weight.shape)) == len(parse_granularity(text).blocks(weight))
    for kind in ("token", "sample"):
        with pytest.raises(RecipeError, match=f"'{kind}' has a scale for every {kind}"):
            parse_granularity(kind).units((64, 96))


def test_the_units_in_the_docstring_are_right() -> None:
    weight, x = torch.zeros(64, 96, 3, 3), torch.zeros(2, 16, 96)
    assert [len(parse_granularity(t).blocks(weight)) for t in ("tensor", "channel", "group-100")] == [1, 64, 64 * 9]
    assert [len(parse_granularity(t, -1).blocks(x)) for t in ("tensor", "channel", "token", "sample", "frame-2")] == [1, 96, 32, 2, 2]


def test_a_symmetric_quantizer_by_hand() -> None:
    """int4 reaches 7 upwards and -8 downwards: 1.75 / 7 = 0.25 against 1 / 8."""
    quantizer = fit(QuantSpec(Int(4)), torch.tensor([1.75, -1.0, 0.3, 0.13]))
    assert quantizer.scale.tolist() == [0.25]
    assert quantizer.zero_point is None
    assert quantizer(torch.tensor([1.75, -1.0, 0.3, 0.13, -9.0])).tolist() == [1.75, -1, 0.25, 0.25, -2]
    assert quantizer.codes(torch.tensor([1.75, -1.0, 0.3, 0.13, -9.0])).tolist() == [15, 4, 9, 9, 0]


def test_the_longer_end_may_be_the_negative_one() -> None:
    """-2 / -8 = 0.25 against 1 / 7."""
    assert fit(QuantSpec(Int(4)), torch.tensor([1.0, -2.0])).scale.tolist() == [0.25]


def test_an_affine_quantizer_by_hand() -> None:
    """From -0.5 to 3.25 in fifteen steps of 0.25; zero is code 2."""
    quantizer = fit(QuantSpec(Int(4, signed=False)), torch.tensor([-0.5, 3.25]))
    assert quantizer.scale.tolist() == [0.25]
    assert quantizer.zero_point is not None
    assert quantizer.zero_point.tolist() == [2]
    assert quantizer(torch.tensor([-0.5, 0.0, 3.25, 0.3, 9.0, -9.0])).tolist() == [-0.5, 0, 3.25, 0.25, 3.25, -0.5]


@pytest.mark.parametrize(("values", "low", "high"), [([2.0, 5.0], 0, 5), ([-5.0, -2.0], -5, 0)])
def test_a_range_on_one_side_of_zero_is_stretched_to_it(values: list[float], low: float, high: float) -> None:
    assert [v.item() for v in MinMax().find(torch.tensor(values), Granularity(), lambda v, a, b: v)] == [low, high]


def test_group_scales_are_rounded_before_codes_are_chosen() -> None:
    """1.01 / 7 is not a bfloat16 number: dequantizing with the stored scale gives exactly what the solver saw."""
    quantizer = fit(QuantSpec(Int(4), Granularity("group", 2)), torch.tensor([[1.01, -0.3]]))
    assert torch.equal(quantizer.scale, quantizer.scale.bfloat16().float())
    assert quantizer.scale.item() != pytest.approx(1.01 / 7, rel=1e-6)


def test_mse_clips_an_outlier_that_costs_the_rest_its_precision() -> None:
    values = torch.cat([torch.linspace(-1, 1, 2001), torch.tensor([2.5])])
    low, high = Mse(p=2.0).find(values, Granularity(), lambda v, a, b: bind(Int(3), Granularity(), a, b)(v))
    assert high.item() < 2.0
    assert low.item() > -1.0  # both ends shrink by the same factor


@pytest.mark.parametrize("scale", ["float", "e4m3"])
def test_four_over_six_lets_each_group_end_where_it_loses_less(scale: str) -> None:
    """e2m1 has 0, 1/2, 1, 3/2, 2, 3, 4 and 6: the first group is exact where its largest value becomes 4, the second where it becomes 6."""
    groups = torch.tensor([[448.0, 336.0, -224.0, 112.0, 6.0, 4.0, -3.0, 0.5]])
    spec = QuantSpec(parse_format("e2m1"), Granularity("group", 4, scale=scale), FourOverSix())
    quantizer = fit(spec, groups)
    torch.testing.assert_close(quantizer.scale, torch.tensor([112.0, 1.0]), rtol=0, atol=0)
    assert torch.equal(quantizer(groups), groups)
    assert not torch.equal(fit(replace(spec, range=MinMax()), groups)(groups), groups)


def test_a_criterion_range_never_clips_what_is_exact_already() -> None:
    """uint2 meets 0, 1, 2, 3 exactly: nothing scores better than the whole range."""
    features = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0], [0.0, 3.0, 0.0, 3.0]])
    quantizer = fit(QuantSpec(parse_format("uint2"), range=ByCriterion()), features)
    assert torch.equal(quantizer(features), features)


def test_fit_keeps_the_alternative_that_suits_the_values() -> None:
    """Powers of two are exact in log2 and far apart in four even levels, and the other way round."""
    even, powers = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([[-1.0, 0.0, 1.0, 0.0]])
    spec = QuantSpec(parse_format("uint2"), alternatives=(parse_format("log2_2"),))
    assert fit(spec, even).format.name == "uint2"
    assert fit(spec, powers).format.name == "log2_2"


@pytest.mark.parametrize("percentile", [0.5, 0.0, 1.01])
def test_a_percentile_lies_between_a_half_and_one(percentile: float) -> None:
    with pytest.raises(RecipeError, match=rf"percentile lies in \(0.5, 1\], got {percentile}"):
        Percentile(percentile)


@pytest.mark.parametrize("rule", [Mse, ByCriterion])
def test_factors_of_a_search_are_checked(rule: type[RangeRule]) -> None:
    with pytest.raises(RecipeError, match="1 to 10000, got 0"):
        rule(candidates=0)
    for smallest in (0.0, -1.0, 1.5):
        with pytest.raises(RecipeError, match=rf"in \(0, 1\], got {smallest}"):
            rule(smallest=smallest)


@pytest.mark.parametrize("largest", [0.9, 2.5])
def test_a_range_grows_to_twice_its_size_at_most(largest: float) -> None:
    with pytest.raises(RecipeError, match=rf"largest is the first factor of the range, in \[1, 2\], got {largest}"):
        Mse(largest=largest)


def test_an_unknown_criterion_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"unknown criterion 'tdscor'; did you mean 'tdscore'\?"):
        ByCriterion("tdscor")
