"""Learned rounding on second moments."""

from __future__ import annotations

import pytest
import torch

from reelquant._errors import RecipeError
from reelquant.formats import Int, Quantizer, QuantSpec, fit, parse_format, parse_granularity
from reelquant.solvers import Adaround, Gptq, Nearest, Problem
from reelquant.solvers.adaround import around


def grid(fmt: str = "int4") -> Quantizer:
    return fit(QuantSpec(parse_format(fmt), parse_granularity("tensor")), torch.tensor([[7.0, -7.0]]))


def test_two_levels_around_every_weight_and_the_starting_one_among_them() -> None:
    low, high = around(grid(), torch.tensor([[0.4, 0.6, 3.0, 9.0]]), torch.tensor([[0.0, 1.0, 1.0, 7.0]]))
    assert low.tolist() == [[0.0, 0.0, 1.0, 6.0]] and high.tolist() == [[1.0, 1.0, 2.0, 7.0]]


@pytest.mark.parametrize("fmt", ["int2", "uint4", "e2m1", "e4m3", "log2_4"])
def test_every_format_has_its_neighbours(fmt: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 16)
    quantizer = fit(QuantSpec(parse_format(fmt), parse_granularity("group-8")), weight)
    low, high = around(quantizer, weight, quantizer(weight))
    assert bool((low < high).all()) and torch.equal(quantizer(low), low) and torch.equal(quantizer(high), high)
    assert bool(((quantizer(weight) == low) | (quantizer(weight) == high)).all())


def test_two_inputs_that_move_together_share_an_error() -> None:
    """0.4 and 0.4 round to 0 each; with equal inputs 0.8 is what counts, and one of them has to be 1."""
    covariance = torch.tensor([[1.0, 0.999, 0.0], [0.999, 1.0, 0.0], [0.0, 0.0, 1.0]])
    problem = Problem(torch.tensor([[0.4, 0.41, 7.0]]), QuantSpec(Int(4), parse_granularity("tensor")), covariance)
    found = Adaround().checked(problem)
    assert found.solver == "adaround" and found.values[0, :2].sum() == 1.0
    assert problem.objective(found.values) < problem.objective(Nearest().checked(problem).values) / 10


def test_it_lies_between_nearest_and_gptq_on_correlated_inputs_and_never_loses_its_start() -> None:
    torch.manual_seed(0)
    rows = torch.randn(500, 12) @ torch.randn(12, 48) + 0.3 * torch.randn(500, 48)
    problem = Problem(torch.randn(24, 48), QuantSpec(Int(3), parse_granularity("channel")), torch.cov(rows.T))
    errors = {
        solver: problem.objective(solver.checked(problem).values) for solver in (Nearest(), Adaround(), Gptq(), Adaround(start="gptq"))
    }
    nearest, learned, gptq, further = errors.values()
    assert learned < nearest / 3 and further <= gptq


def test_wrong_parameters() -> None:
    with pytest.raises(RecipeError, match="unknown start 'comq' of adaround"):
        Adaround(start="comq")
    with pytest.raises(RecipeError, match="adaround needs iterations >= 1"):
        Adaround(iterations=0)
