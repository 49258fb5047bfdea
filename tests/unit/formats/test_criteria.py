from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reelquant.formats import Granularity, bind, parse_format
from reelquant.formats.criteria import coverage, negative_nmse, nmse, retrieval_accuracy, tdscore, temporal_objective
from reelquant.formats.ranges import bounds

seeds = st.integers(0, 2**16)


def features(seed: int, steps: int = 8, dim: int = 16) -> Tensor:
    """Features such as SiLU gives: neighbours in time are alike, a long positive tail, a floor at -0.278."""
    generator = torch.Generator().manual_seed(seed)
    walk = torch.randn(steps, dim, generator=generator).cumsum(0) + torch.randn(dim, generator=generator)
    return torch.nn.functional.silu(walk)


@given(seed=seeds)
def test_a_lossless_quantizer_scores_exactly_one(seed: int) -> None:
    e = features(seed)
    assert tdscore(e, e.clone()) == 1
    assert temporal_objective(e, e.clone()) == 1


@given(seed=seeds, size=st.floats(1e-3, 3.0))
def test_no_perturbation_scores_more_than_lossless(seed: int, size: float) -> None:
    e = features(seed)
    score = tdscore(e, e + size * torch.randn(e.shape, generator=torch.Generator().manual_seed(seed)))
    assert -0.5 <= score < 1


@given(seed=seeds, steps=st.integers(2, 9))
def test_collapsed_timesteps_score_zero_or_less(seed: int, steps: int) -> None:
    e = features(seed, steps)
    for merged in (e.mean(0), e[0], e[-1], torch.zeros_like(e[0])):
        assert tdscore(e, merged.expand_as(e)) <= 1e-12


@given(seed=seeds, exponent=st.integers(-12, 12))
def test_the_scores_do_not_depend_on_the_scale(seed: int, exponent: int) -> None:
    """Powers of two scale exactly; what is left is the absolute guard of 1e-12 against distances of about 1e-4."""
    e = features(seed)
    test = e + 0.1 * torch.randn(e.shape)
    scale = 2.0**exponent
    assert float(tdscore(scale * e, scale * test)) == pytest.approx(float(tdscore(e, test)), abs=1e-6)
    assert float(nmse(scale * e, scale * test)) == pytest.approx(float(nmse(e, test)), rel=1e-6)
    assert retrieval_accuracy(scale * e, scale * test) == retrieval_accuracy(e, test)


def test_nmse_does_not_depend_on_the_scale_of_tiny_values_either() -> None:
    e = features(0)
    test = e + 0.1
    assert float(nmse(1e-9 * e, 1e-9 * test)) == pytest.approx(float(nmse(e, test)), rel=1e-5)


def test_a_coarse_grid_that_pushes_timesteps_apart_is_not_rewarded() -> None:
    """Rounding to 0 and 3 sends 1.4 and 1.6 far apart: a one-sided ratio would call that perfectly separated."""
    e = torch.tensor([[1.4, 0.0], [1.6, 0.2], [0.0, 1.4]])
    coarse = torch.round(e / 3) * 3
    assert (coarse[0] - coarse[1]).norm() > 10 * (e[0] - e[1]).norm()
    assert tdscore(e, coarse) < 0.5


@given(seed=seeds)
def test_more_bits_do_not_score_much_worse(seed: int) -> None:
    e = features(seed)
    grain = Granularity()
    scores = [float(tdscore(e, bind(parse_format(f"uint{bits}"), grain, *bounds(e, grain))(e))) for bits in (2, 8)]
    assert scores[0] < scores[1]
    assert scores[1] > 0.9


def test_tdscore_by_hand() -> None:
    """Two orthogonal unit vectors; the second one is quantized to half its length.

    Both still point at themselves: r = 1 - 0 in both, as in float, so that half is 1. Their distance falls from sqrt(2) to
    sqrt(1.25), so the other half is sqrt(1.25 / 2) for both.
    """
    e = torch.eye(2)
    test = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    assert float(tdscore(e, test)) == pytest.approx((1 + math.sqrt(1.25 / 2)) / 2, abs=1e-7)


def test_twice_as_far_apart_is_as_wrong_as_half_as_far() -> None:
    """The directions are right (first half: 1), the distances are off by a factor of two (second half: 1/2)."""
    e = torch.tensor([[3.0, 0.0], [0.0, 4.0], [1.0, 1.0]])
    assert float(tdscore(e, 2 * e)) == pytest.approx(0.75, abs=1e-7)
    assert float(tdscore(e, e / 2)) == pytest.approx(0.75, abs=1e-7)


def test_the_objective_also_charges_the_error() -> None:
    """Doubling: an error of mean square (9 + 16 + 1 + 1) / 6 against a variance of 27 / 6 - (9 / 6)^2."""
    e = torch.tensor([[3.0, 0.0], [0.0, 4.0], [1.0, 1.0]])
    assert float(temporal_objective(e, 2 * e)) == pytest.approx(0.75 - 4.5 / (4.5 - 2.25), abs=1e-6)


def test_swapped_timesteps_keep_their_distance_and_lose_their_identity() -> None:
    """r = 0 - 1 for both, clipped at -1; distances are untouched: (-1 + 1) / 2."""
    assert tdscore(torch.eye(2), torch.eye(2).flip(0)) == 0
    assert retrieval_accuracy(torch.eye(2), torch.eye(2).flip(0)) == 0


def test_one_timestep_has_nothing_to_be_told_from() -> None:
    one = torch.ones(1, 4)
    assert tdscore(one, one.clone()) == 1
    assert tdscore(one, 2 * one) == 0


def test_two_equal_timesteps_do_not_divide_by_zero() -> None:
    e = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert tdscore(e, e.clone()) == 1
    assert tdscore(e, e + torch.tensor([[0.1, 0.0], [0.0, 0.1], [0.0, 0.0]])).isfinite()


def test_nmse_by_hand() -> None:
    """Error 1 in one of four values, variance of 0, 2, 0, 2 is 1: (1 / 4) / 1."""
    reference = torch.tensor([0.0, 2.0, 0.0, 2.0])
    assert nmse(reference, torch.tensor([0.0, 2.0, 0.0, 3.0])) == 0.25
    assert negative_nmse(reference, reference) == 0


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_nmse_of_a_constant_is_zero_only_if_it_is_met(value: float) -> None:
    reference = torch.full((5,), value)
    assert nmse(reference, reference) == 0
    assert nmse(reference, reference + 1) > 1e6


def test_retrieval_accuracy_by_hand() -> None:
    """The last feature now points along the first axis: two of three still find themselves."""
    test = torch.eye(3)
    test[2] = torch.tensor([1.0, 0.0, 0.5])
    assert float(retrieval_accuracy(torch.eye(3), test)) == pytest.approx(2 / 3)


def test_coverage_by_hand() -> None:
    """Channel 0 uses codes 0, 1, 3 of four, channel 1 uses one."""
    codes = torch.tensor([[0, 2], [1, 2], [3, 2], [3, 2], [1, 2]], dtype=torch.uint8)
    assert coverage(codes, bits=2) == (3 / 4 + 1 / 4) / 2


def test_coverage_counts_against_the_samples_if_they_are_few() -> None:
    codes = torch.tensor([[0, 7], [200, 7]], dtype=torch.uint8)
    assert coverage(codes, bits=8) == (2 / 2 + 1 / 2) / 2
