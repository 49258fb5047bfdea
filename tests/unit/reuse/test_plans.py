"""Schedules of the least damage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from reelquant.reuse.plans import Errors, even, expected, plans

COUNT = 8


def errors(seed: int = 0, *, fitted: bool = False) -> Errors:
    """Results of eight steps that wander at random, and steps that matter differently."""
    dice = np.random.default_rng(seed)
    results = dice.normal(size=(COUNT, 5)).cumsum(0)
    times = 1000 - dice.uniform(50, 150, COUNT).cumsum()
    return Errors(times.tolist(), results @ results.T, dice.uniform(0.1, 2, COUNT), fitted)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(("seed", "fitted"), [(0, False), (1, False), (2, True)])
def test_plans_are_the_best_of_all_schedules(order: int, seed: int, fitted: bool) -> None:
    known = errors(seed, fitted=fitted)
    found = plans(known, order)
    assert list(found) == list(range(1, COUNT + 1))
    for number, plan in found.items():
        every = [(0, *rest) for rest in itertools.combinations(range(1, COUNT), number - 1)]
        least = min(expected(known, steps, order) for steps in every)
        assert plan.damage == pytest.approx(least) == expected(known, plan.steps, order)
        assert len(plan.steps) == number and plan.steps[0] == 0


def test_damage_is_the_weighted_error_of_a_forecast() -> None:
    results = np.array([[1.0, 0.0], [2.0, 1.0], [5.0, 0.0]])
    known = Errors([3.0, 2.0, 1.0], results @ results.T, np.array([1.0, 1.0, 10.0]))
    assert expected(known, (0, 1), 0) == pytest.approx(10 * (9 + 1))  # repeats (2, 1)
    assert expected(known, (0, 1), 1) == pytest.approx(10 * (4 + 4))  # a line from (1, 0) through (2, 1) gives (3, 2)


def test_fitted_weights_are_those_of_least_squares() -> None:
    dice = np.random.default_rng(0)
    results = dice.normal(size=(4, 50))
    results[3] = 0.3 * results[1] - 1.2 * results[2]
    known = Errors([4.0, 3.0, 2.0, 1.0], results @ results.T, np.ones(4), fitted=True)
    assert known.shares((1, 2), [3])[0] == pytest.approx([0.3, -1.2], rel=1e-3)
    assert expected(known, (0, 1, 2), 1) < 1e-3 * float(known.gram[3, 3])
    polynomial = Errors(known.timesteps, known.gram, known.weight)
    for order in (0, 1):
        for steps in ((0, 1), (0, 2), (0, 1, 2)):
            assert expected(known, steps, order) <= expected(polynomial, steps, order)


def test_errors_of_a_pause_add_up_and_pauses_are_independent() -> None:
    results = np.array([[0.0], [1.0], [2.0], [2.0], [5.0]])
    known = Errors([5.0, 4.0, 3.0, 2.0, 1.0], results @ results.T, np.ones(5))
    assert expected(known, (0, 3), 0) == pytest.approx((1 + 2) ** 2 + 3**2)


def test_computed_everywhere_nothing_is_damaged() -> None:
    assert plans(errors(), 1)[COUNT].damage == 0.0


def test_the_longest_pause_bounds_how_few_steps_are_computed() -> None:
    assert min(plans(errors(), 0, longest=3)) == 3


def test_even_spacing() -> None:
    assert even(20, 10) == tuple(range(0, 20, 2)) and even(5, 5) == (0, 1, 2, 3, 4) and even(7, 1) == (0,)


def test_steady_weights_follow_the_trend_of_noisy_ones() -> None:
    trend = np.exp(-0.3 * np.arange(8))
    noisy = trend * np.array([1.0, 5.0, 0.2, 1.0, 1.0, 1.0, 0.2, 5.0])
    noisy[0] = 0.0
    found = Errors(range(8, 0, -1), np.eye(8), noisy).steady.weight
    assert found[0] == 0.0 and found[1:] == pytest.approx(trend[1:], rel=1e-9)
