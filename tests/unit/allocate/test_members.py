"""Searches beside the integer program: what they are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from reelquant.allocate.greedy import greedy
from reelquant.allocate.problem import Problem
from reelquant.allocate.sampled import around, cross_entropy, random_picks
from reelquant.allocate.surrogate import learned, surrogate


def problem(of: int = 0, **more: object) -> Problem:
    generator = np.random.default_rng(of)
    size = generator.lognormal(-2, 1.5, (24, 1))
    damage = size * np.array([[1.0, 0.25, 0.02]]) * generator.lognormal(0, 0.1, (24, 3))
    sizes = generator.integers(20, 60, (24, 1)) * np.array([[3.0, 4.0, 6.0]])
    return Problem(damage, sizes, 0.6 * sizes[:, 0].sum() + 0.4 * sizes[:, 2].sum(), **more)  # type: ignore[arg-type]


def test_greedy_jumps_over_a_format_that_is_no_better() -> None:
    # 4 bits save nothing in layer 0, and 8 bits save all
    damage, sizes = np.array([[9.0, 9.0, 0.0], [1.0, 0.5, 0.4]]), np.array([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    assert greedy(Problem(damage, sizes, 5.0)) == [2, 0]
    assert greedy(Problem(damage, sizes, 6.0)) == [2, 1]


def test_random_allocations_differ_and_fill_the_budget() -> None:
    one = problem()
    picks = random_picks(one, 30)
    assert len(set(map(tuple, picks))) > 25 and picks == random_picks(one, 30)
    assert all(0.95 * one.budget <= one.size(pick) <= one.budget for pick in picks)


def test_draws_near_an_allocation_share_most_of_it() -> None:
    one = problem()
    best = greedy(one)
    same = np.array([np.mean(np.array(pick) == best) for pick in around(one, best, 20)])
    assert 0.5 < same.mean() < 1 and same.mean() > np.mean([np.mean(np.array(pick) == best) for pick in random_picks(one, 20)]) + 0.15


def test_the_cross_entropy_search_beats_the_best_of_as_many_random_draws() -> None:
    one = problem(4)
    found = cross_entropy(one)
    assert one.fits(found) and one.predicted(found) < min(map(one.predicted, random_picks(one, 200)))


def test_a_trial_decides_between_the_last_best_ones() -> None:
    asked: list[tuple[int, ...]] = []

    def trial(picks: Sequence[int]) -> float:
        asked.append(tuple(picks))
        return -float(len(asked))  # the last one that is asked is the best

    found = cross_entropy(problem(trial=trial))
    assert 1 < len(asked) <= 6 and tuple(found) == asked[-1]


def true_damage(one: Problem, factors: np.ndarray, picks: Sequence[int]) -> float:
    """Some layers do far more harm beside others than alone."""
    return float((one.damage * factors[:, None])[np.arange(24), list(picks)].sum())


def test_a_surrogate_learns_which_layers_do_more_harm_than_alone() -> None:
    one = problem(1)
    order = np.argsort(one.damage[:, 0])
    factors = np.ones(24)
    factors[order[-6:]] = np.tile([0.2, 5.0], 3)  # half of the most sensitive layers each way
    tried = [(pick, true_damage(one, factors, pick)) for pick in random_picks(one, 60)]
    found = learned(one.damage, tried)
    unseen = random_picks(problem(1, seed=9), 40)
    truth = [true_damage(one, factors, pick) for pick in unseen]
    plain = np.corrcoef([one.predicted(pick) for pick in unseen], truth)[0, 1]
    better = np.corrcoef([float(found[np.arange(24), pick].sum()) for pick in unseen], truth)[0, 1]
    assert better > 0.95 and better > plain + 0.1
    assert found == pytest.approx(learned(one.damage, tried))


def test_a_surrogate_with_trials_is_never_tried_to_be_worse_than_the_program() -> None:
    from reelquant.allocate.milp import solve

    factors = np.where(np.arange(24) % 2, 5.0, 0.2)
    one = problem(2)
    asked = problem(2, trial=lambda picks: true_damage(one, factors, picks))
    found = surrogate(asked, 40)
    assert one.fits(found)
    assert true_damage(one, factors, found) <= true_damage(one, factors, solve(one.damage, one.sizes, one.budget))
