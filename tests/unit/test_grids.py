"""The helper that chooses a part of a grid."""

from __future__ import annotations

import itertools

import pytest

from tests.grids import sampled

GRID = list(itertools.product("abcdef", range(5), (None, True), ("x", "y", "z")))


def pairs(cases: list[tuple[object, ...]]) -> set[object]:
    return {((i, case[i]), (j, case[j])) for case in cases for i, j in itertools.combinations(range(4), 2)}


def test_the_part_holds_every_pair_of_values_and_the_corners() -> None:
    part = sampled(GRID, 40, every=False)
    assert len(part) == len(set(part)) == 40
    assert pairs(part) == pairs(GRID)
    assert part[0] == GRID[0] and part[-1] == GRID[-1]
    assert part == [case for case in GRID if case in part] == sampled(GRID, 40, every=False)


def test_pairs_that_the_grid_leaves_out_are_not_asked_for() -> None:
    grid = [case for case in GRID if case[:2] != ("a", 0)]
    part = sampled(grid, 40, every=False)
    assert pairs(part) == pairs(grid) < pairs(GRID)


def test_all_cases_are_tested_where_that_is_asked_for_or_they_are_few() -> None:
    assert sampled(GRID, 40, every=True) == GRID
    assert sampled(GRID, len(GRID), every=False) == GRID


def test_a_part_that_is_too_small_for_all_pairs_is_an_error() -> None:
    with pytest.raises(ValueError, match="29 of 180 cases do not cover all pairs of values; give most="):
        sampled(GRID, 29, every=False)
