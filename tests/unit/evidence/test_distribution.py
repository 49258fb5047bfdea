"""Distances of sets of features: against scipy's matrix root and sums by hand, and what is known of their bias and spread."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import Tensor

from reelquant._errors import MeasurementError
from reelquant.evidence.distribution import Moments, bias_curve, extrapolated, frechet, frechet_moments, jackknife, kernel_distance


def normal(n: int, d: int, seed: int, spread: float = 1.0, mean: float = 0.0) -> Tensor:
    """Correlated samples, as features are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64) / math.sqrt(d)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing * spread + mean


def by_sqrtm(a: Tensor, b: Tensor) -> float:
    """The formula of the papers' scripts: np.cov and scipy.linalg.sqrtm."""
    one, two = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = np.real(sqrtm(one @ two))
    return float(np.square(a.numpy().mean(0) - b.numpy().mean(0)).sum() + np.trace(one + two - 2 * root))


def test_the_frechet_distance_of_one_dimension_is_worked_out_by_hand() -> None:
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [13.0]])  # means 1 and 9, variances 2 and 32
    assert frechet(a, b) == pytest.approx(8**2 + 2 + 32 - 2 * math.sqrt(2 * 32))  # 82


@pytest.mark.parametrize(("n", "m"), [(200, 300), (64, 64), (40, 300)])
def test_the_frechet_distance_is_that_of_scipys_matrix_root(n: int, m: int) -> None:
    a, b = normal(n, 32, 1), normal(m, 32, 2, spread=1.3, mean=0.2)
    assert frechet(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-9)


@given(n=st.integers(2, 12), m=st.integers(2, 40), seed=st.integers(0, 1000))
def test_fewer_samples_than_dimensions_give_the_same_number_by_singular_values_as_by_eigenvalues(n: int, m: int, seed: int) -> None:
    a, b = normal(n, 16, seed), normal(m, 16, seed + 1, spread=2.0)
    by_moments = frechet_moments(Moments().update(a), Moments().update(b))
    assert frechet(a, b) == pytest.approx(by_moments, rel=1e-5)  # roots of eigenvalues that are 0 but for rounding: sqrt(1e-16) each


@pytest.mark.parametrize("n", [5, 300])
def test_equal_sets_are_at_no_distance_and_the_order_of_samples_does_not_matter(n: int) -> None:
    a = normal(n, 32, 3)
    size = float(a.var(0).sum())
    assert 0 <= frechet(a, a) < 1e-9 * size
    assert 0 <= frechet(a, a[torch.randperm(n)]) < 1e-9 * size


def test_a_shift_adds_its_square_and_a_distance_is_symmetric() -> None:
    a = normal(20, 32, 4)
    assert frechet(a, a + 0.5) == pytest.approx(32 * 0.25)
    b = normal(25, 32, 5)
    assert frechet(a, b) == pytest.approx(frechet(b, a))


def test_float32_features_far_from_zero_lose_no_digits() -> None:
    a, b = normal(100, 8, 6).float(), normal(100, 8, 7).float()
    exact = frechet(a.double() + 1e6, b.double() + 1e6)
    assert exact == pytest.approx(frechet(a, b), rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), "2 samples at least, the reference set has 1"),
        (torch.zeros(5, 3), torch.zeros(0, 3), "the test set has 0"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "3 numbers a sample against 4"),
        (torch.zeros(5, 3, 2), torch.zeros(5, 3), r"\[n, d\]"),
        (torch.full((5, 3), torch.nan), torch.zeros(5, 3), "NaN"),
    ],
)
def test_sets_that_have_no_distance_are_refused(a: Tensor, b: Tensor, words: str) -> None:
    for distance in (frechet, kernel_distance):
        with pytest.raises(MeasurementError, match=words):
            distance(a, b)


def test_moments_taken_in_parts_are_those_of_the_whole() -> None:
    a = normal(103, 16, 8) + 1000
    moments = Moments()
    for part in a.split(10):
        moments.update(part)
    moments.update(a[:0])
    assert moments.count == 103
    torch.testing.assert_close(moments.mean, a.mean(0))
    np.testing.assert_allclose(moments.covariance.numpy(), np.cov(a.numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


def test_moments_refuse_what_they_cannot_take_in() -> None:
    with pytest.raises(MeasurementError, match="2 samples at least, got 1"):
        _ = Moments().update(torch.zeros(1, 3)).covariance
    with pytest.raises(MeasurementError, match="3 numbers a sample cannot take in"):
        Moments().update(torch.zeros(2, 3)).update(torch.zeros(2, 4))
    with pytest.raises(MeasurementError, match="NaN"):
        Moments().update(torch.full((2, 3), torch.inf))
    with pytest.raises(MeasurementError, match="different networks"):
        frechet_moments(Moments().update(torch.zeros(2, 3)), Moments().update(torch.zeros(2, 4)))


def test_the_kernel_distance_of_two_pairs_is_worked_out_by_hand() -> None:
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    # k(x, y) = (x y + 1)^3: within a 1, within b 7^3 = 343, across 1, 1, 27, 64
    value, spread = kernel_distance(a, b)
    assert (value, spread) == (pytest.approx(1 + 343 - 2 * (1 + 1 + 27 + 64) / 4), 0.0)


def test_the_kernel_distance_has_no_bias() -> None:
    values = [kernel_distance(normal(30, 8, 2 * i), normal(30, 8, 2 * i + 1))[0] for i in range(200)]
    mean, error = np.mean(values), np.std(values) / math.sqrt(len(values))
    assert abs(mean) < 3 * error
    assert min(values) < 0
    assert kernel_distance(normal(30, 8, 0), normal(30, 8, 1, mean=1.0))[0] > max(values)


def test_kernel_subsets_are_drawn_by_the_seed() -> None:
    a, b = normal(60, 8, 1), normal(50, 8, 2, spread=1.5)
    first = kernel_distance(a, b, subsets=10, subset_size=20, seed=1)
    assert first == kernel_distance(a, b, subsets=10, subset_size=20, seed=1)
    assert first != kernel_distance(a, b, subsets=10, subset_size=20, seed=2)
    assert first[1] > 0
    with pytest.raises(MeasurementError, match="at least one subset"):
        kernel_distance(a, b, subsets=0)


def test_the_jackknife_of_a_difference_of_means_is_the_known_interval() -> None:
    """For a mean, leaving out one at a time gives exactly the usual standard error."""
    a, b = torch.zeros(20, 1), torch.arange(20.0)[:, None]
    value, low, high = jackknife(a.split(1), b.split(1), lambda x, y: float((y - x).mean()), groups=20)
    error = float(b.std() / math.sqrt(20))
    assert value == pytest.approx(9.5)
    assert (low, high) == (pytest.approx(9.5 - 2.0930 * error, rel=1e-4), pytest.approx(9.5 + 2.0930 * error, rel=1e-4))  # t(19), 97.5 %


def test_the_jackknife_covers_where_the_bootstrap_is_biased() -> None:
    """At 60 pairs of 16 dimensions: means over fresh samples of what is estimated, the jackknife's intervals and bootstrap draws."""
    a, b = normal(4000, 16, 1), normal(4000, 16, 1) + 0.6 * normal(4000, 16, 2)
    blocks = list(zip(a.split(60), b.split(60), strict=True))[:40]
    expected = float(np.mean([frechet(x, y) for x, y in blocks]))
    intervals = [jackknife(x.split(1), y.split(1), frechet) for x, y in blocks]
    covered = sum(low <= expected <= high for _, low, high in intervals) / len(intervals)
    assert covered >= 0.85  # 95 % nominal, 40 intervals
    x, y = blocks[0]
    draws = [torch.randint(60, (60,)) for _ in range(50)]
    redrawn = float(np.mean([frechet(x[i], y[i]) for i in draws]))
    assert redrawn > frechet(x, y) * 1.03


def test_sets_that_do_not_belong_together_take_turns_and_their_variances_add_up() -> None:
    a, b = torch.arange(20.0)[:, None], torch.arange(20.0)[:, None] * 2
    value, low, high = jackknife(a.split(1), b.split(1), lambda x, y: float(y.mean() - x.mean()), groups=20, together=False)
    error = math.sqrt(float(a.var() + b.var()) / 20)
    assert value == pytest.approx(9.5)
    assert high - low == pytest.approx(2 * 2.0244 * error, rel=1e-4)  # t(38), 97.5 %


def test_all_rows_of_a_clip_leave_together() -> None:
    clips = [torch.full((rows, 1), float(i)) for i, rows in enumerate((1, 4, 2, 3))]
    seen: list[int] = []
    jackknife(clips, clips, lambda x, y: float(seen.append(len(x)) or 0.0), groups=4)
    assert seen == [10, 9, 6, 8, 7]


def test_the_jackknife_of_too_few_clips_has_no_width_and_of_unequal_sets_is_refused() -> None:
    two = torch.tensor([[0.0], [2.0]]).split(1)
    assert jackknife(two, two, frechet) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    with pytest.raises(MeasurementError, match="5 reference and 6 test"):
        jackknife(torch.zeros(5, 2).split(1), torch.zeros(6, 2).split(1), frechet)


def test_fewer_samples_make_the_distance_larger_and_the_line_in_1_over_n_takes_that_away() -> None:
    a, b = normal(3000, 8, 1), normal(3000, 8, 2)  # one distribution: the true distance is 0
    curve = bias_curve(a, b, [50, 100, 200, 400], repeats=10)
    assert [size for size, _, _ in curve] == [50, 100, 200, 400]
    means = [mean for _, mean, _ in curve]
    assert means == sorted(means, reverse=True)
    assert means[0] / means[3] == pytest.approx(8, rel=0.25)  # it shrinks as 1 / n
    assert abs(extrapolated(curve)) < means[3] / 4


def test_a_bias_curve_repeats_and_its_sizes_must_exist() -> None:
    a, b = normal(30, 4, 1), normal(20, 4, 2)
    assert bias_curve(a, b, [5, 20], repeats=3, seed=1) == bias_curve(a, b, [5, 20], repeats=3, seed=1)
    for size in (1, 21):
        with pytest.raises(MeasurementError, match=f"subsets of {size} samples"):
            bias_curve(a, b, [size])
    with pytest.raises(MeasurementError, match="2 different sizes"):
        extrapolated([(5, 1.0, 0.0)])


def test_pairs_stay_together_in_a_bias_curve() -> None:
    a = normal(40, 4, 1)
    assert all(mean < 1e-9 for _, mean, _ in bias_curve(a, a, [5, 10], repeats=3))
