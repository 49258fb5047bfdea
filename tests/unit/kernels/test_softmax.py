"""The softmax of attention: as good as one in float64 that is rounded once, for every width, and honest about NaN and infinities."""

from __future__ import annotations

import math

import pytest
import torch

from reelquant.kernels.cpu.softmax import softmax_

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("keys", [1, 2, 15, 16, 31, 32, 33, 77, 128, 1000])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 1e4])
def test_it_is_exact_but_for_one_rounding(keys: int, spread: float) -> None:
    torch.manual_seed(0)
    scores = (torch.randn(70, keys) * spread).bfloat16()
    exact = torch.softmax(scores.double() * 0.3, -1)
    found = softmax_(scores, 0.3)
    assert found is scores
    # half a unit in the last of 8 bits, and float32 before it; what float32 cannot tell from nothing is nothing
    assert bool(((found.double() - exact).abs() <= exact * (2**-8 + 1e-3) + 1e-37).all())


@pytest.mark.parametrize("strange", [[NAN], [-NAN], [INF], [INF, -INF], [-INF], [-INF, NAN]])
def test_a_row_with_strange_numbers_is_what_torch_makes_of_it(strange: list[float]) -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 40).bfloat16()
    scores[1, 5 : 5 + len(strange)] = torch.tensor(strange).bfloat16()
    expected = torch.softmax(scores.float(), -1)
    torch.testing.assert_close(softmax_(scores, 1.0).float(), expected, rtol=2**-7, atol=1e-30, equal_nan=True)


def test_a_row_that_is_all_minus_infinity_is_nan() -> None:
    assert bool(softmax_(torch.full((1, 20), -INF).bfloat16(), 1.0).isnan().all())


def test_large_matrices_are_shared_between_threads() -> None:
    torch.manual_seed(0)
    scores = torch.randn(1000, 300).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = softmax_(scores.clone(), 1.0)
        torch.set_num_threads(1)
        assert torch.equal(together, softmax_(scores.clone(), 1.0))
    finally:
        torch.set_num_threads(threads)
