"""Coordinate descent of codes and scales, and error feedback: by hand, and against starts and brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reelquant._errors import RecipeError
from reelquant.formats import RANGES, Granularity, Int, Quantizer, QuantSpec, parse_format, parse_granularity
from reelquant.solvers import SOLVERS, Problem
from reelquant.solvers.als import better_scales
from reelquant.solvers.descent import descend

GRAINS = ("tensor", "channel", "group-8")


def correlated(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(400, 5, generator=generator) @ torch.randn(5, width, generator=generator)
    return torch.cov((rows + 0.3 * torch.randn(400, width, generator=generator)).T, correction=0)


def problem(fmt: str = "int3", grain: str = "channel", scale: str = "float", width: int = 40) -> Problem:
    torch.manual_seed(2)
    spec = QuantSpec(parse_format(fmt), parse_granularity(grain, scale=scale), RANGES["minmax"]())
    return Problem(torch.randn(24, width), spec, correlated(width))


def objective(given: Problem, name: str, **options: Any) -> float:
    return given.objective(SOLVERS[name](**options).checked(given).values)


# ------------------------------------------------------------------------------------------------------------------------- codes


def test_one_pass_by_hand() -> None:
    quantizer = Quantizer(Int(4), Granularity("channel"), torch.tensor([1.0]))
    given = Problem(torch.tensor([[0.4, 0.4]]), QuantSpec(Int(4)), torch.tensor([[2.0, 1.9], [1.9, 1.95]]))
    # nearest is 0, 0 with the error -0.4, -0.4: slopes -1.56 and -1.54. Column 0 wants 0 + 1.56 / 2 = 0.78 and takes 1; then column 1
    # has the slope -1.54 + 1.9 = 0.36 and wants 0 - 0.36 / 1.95 = -0.18: it stays.
    assert descend(given, quantizer, torch.zeros(1, 2)).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("start", ["nearest", "gptq"])
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("fmt", ["int3", "uint4", "e2m1", "power_4"])
def test_descent_lowers_the_objective_of_its_start(fmt: str, grain: str, start: str) -> None:
    given = problem(fmt, grain)
    assert objective(given, "comq", start=start) < objective(given, start)


def test_no_single_code_can_be_better_in_the_end() -> None:
    given = problem(width=10)
    solution = SOLVERS["comq"](passes=50).solve(given)
    values, quantizer = solution.values, solution.quantizer
    lowest = given.objective(values)
    for row, column in itertools.product(range(4), range(10)):
        for code in range(8):
            changed = solution.codes.clone()
            changed[row, column] = code
            assert given.objective(quantizer.dequantize(changed)) >= lowest * (1 - 1e-5), (row, column, code)


def test_the_block_of_columns_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(width=30)
    codes = SOLVERS["comq"]().solve(given).codes
    monkeypatch.setattr("reelquant.solvers.descent.BLOCK", 7)
    assert torch.equal(SOLVERS["comq"]().solve(given).codes, codes)


# ------------------------------------------------------------------------------------------------------------------------- scales


def test_scales_by_hand() -> None:
    quantizer = Quantizer(Int(4), Granularity("channel"), torch.tensor([1.0]))
    given = Problem(torch.tensor([[1.5, 3.0]]), QuantSpec(Int(4)), torch.eye(2))
    codes = torch.tensor([[9, 10]], dtype=torch.uint8)  # levels 1 and 2: the best scale is (1.5 + 6) / 5
    assert better_scales(given, quantizer, codes).scale.tolist() == [1.5]


@pytest.mark.parametrize("grain", GRAINS)
def test_scales_have_the_error_of_least_squares(grain: str) -> None:
    given = problem("int4", grain)
    found = SOLVERS["nearest"]().solve(given)
    quantizer = found.quantizer
    for _ in range(60):
        quantizer = better_scales(given, quantizer, found.codes)
    levels = found.codes.float() - 8
    size = {"tensor": 40, "channel": 40, "group-8": 8}[grain]
    rows = [slice(0, 24)] if grain == "tensor" else [slice(row, row + 1) for row in range(24)]
    scales = []
    root = torch.linalg.cholesky(given.covariance.double())
    for some in rows:  # every unit's levels as one long column, the root of the covariance as the weight of the errors
        units = [torch.zeros_like(levels[some]) for _ in range(40 // size)]
        for number, unit in enumerate(units):
            unit[:, number * size : (number + 1) * size] = levels[some, number * size : (number + 1) * size]
        columns = torch.stack([(unit.double() @ root).flatten() for unit in units], 1)
        scales.append(torch.linalg.lstsq(columns, (given.weight[some].double() @ root).flatten()[:, None]).solution[:, 0])
    least = given.objective(replace(quantizer, scale=torch.cat(scales).float()).dequantize(found.codes))
    start = given.objective(found.values)
    # bfloat16 rounds every scale: what is left of the gain is at least nine tenths
    assert start - given.objective(quantizer.dequantize(found.codes)) > 0.9 * (start - least)


@pytest.mark.parametrize("scale", ["float", "e4m3", "e8m0"])
def test_better_scales_can_be_stored_and_win(scale: str) -> None:
    given = problem("e2m1", "group-8", scale)
    solution = SOLVERS["als"]().checked(given)
    assert given.objective(solution.values) < objective(given, "gptq")
    start = SOLVERS["gptq"]().checked(given).quantizer
    moved = better_scales(given, start, solution.codes)
    assert torch.equal(better_scales(given, moved, solution.codes).whole or torch.ones(1), start.whole or torch.ones(1))


@pytest.mark.parametrize("grain", GRAINS)
def test_scales_and_codes_beat_codes_alone(grain: str) -> None:
    given = problem("int3", grain)
    assert objective(given, "als") < 0.98 * objective(given, "comq")


# ------------------------------------------------------------------------------------------------------------------------ feedback


def test_feedback_by_hand() -> None:
    spec = QuantSpec(Int(4), Granularity("channel"), RANGES["minmax"]())
    weight = torch.tensor([[7.0, 0.4, 0.4, 0.4, 0.4]])  # scale 1; the error grows by 0.4 a column until it is rounded off
    assert SOLVERS["sigma_delta"]().solve(Problem(weight, spec)).values.tolist() == [[7.0, 0.0, 1.0, 0.0, 1.0]]
    assert SOLVERS["sigma_delta"](feedback=0.1).solve(Problem(weight, spec)).values.tolist() == [[7.0, 0.0, 0.0, 0.0, 0.0]]


def test_feedback_wins_where_neighbours_are_alike_and_is_replaced_elsewhere() -> None:
    torch.manual_seed(0)
    spec = QuantSpec(Int(3), Granularity("channel"), RANGES["minmax"]())
    places = torch.arange(48)
    smooth = torch.exp(-(places[:, None] - places).abs() / 20.0)
    weight = torch.randn(16, 48)
    like = Problem(weight, spec, smooth)
    assert SOLVERS["sigma_delta"]().checked(like).replaced is None
    assert objective(like, "sigma_delta") < 0.5 * objective(like, "nearest")
    assert SOLVERS["sigma_delta"]().checked(Problem(weight, spec, torch.eye(48))).replaced == "sigma_delta"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("comq", {"start": "gptk"}, "unknown start 'gptk' of comq"),
        ("als", {"passes": 0}, "passes of als is at least 1, got 0"),
        ("sigma_delta", {"feedback": 0.0}, "feedback of sigma_delta lies in"),
    ],
)
def test_wrong_parameters(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SOLVERS[name](**options)
