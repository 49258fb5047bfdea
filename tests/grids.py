"""Large grids of cases: a part that covers every pair of values in ``make test``, all of them in ``make test-all``."""

from __future__ import annotations

import itertools
import os
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

ALL = os.environ.get("REELQUANT_TEST_ALL", "0") == "1"
"""Whether this run tests every case; ``make test-all`` sets the environment variable."""

Case = TypeVar("Case", bound=Sequence[Hashable])
Pair = tuple[int, Hashable, int, Hashable]


def sampled(cases: Iterable[Case], most: int, *, every: bool = ALL) -> list[Case]:
    """A part of a grid, the same one every time; every case if ``every``.

    The part holds the first and the last case, and for any two axes every pair of values that occurs in the grid. Further cases,
    evenly spread, fill it up to ``most``.

    Args:
        cases: one value per axis each.
        most: number of cases of the part; all cases if there are no more than that.
        every: ask for all cases.

    Raises:
        ValueError: if ``most`` cases do not cover all pairs.
    """
    grid = list(cases)
    if every or len(grid) <= most:
        return grid
    chosen = _covering(grid)
    if len(chosen) > most:
        raise ValueError(f"{most} of {len(grid)} cases do not cover all pairs of values; give most={len(chosen)} or more")
    rest = [i for i in range(len(grid)) if i not in chosen]
    missing = most - len(chosen)
    chosen |= {rest[i * len(rest) // missing] for i in range(missing)}
    return [grid[i] for i in sorted(chosen)]


def _covering(grid: Sequence[Sequence[Hashable]]) -> set[int]:
    """Indices of cases that hold every pair: the corners, then always the first case with the most pairs that are missing."""
    pairs = [_pairs(case) for case in grid]
    chosen = {0, len(grid) - 1}
    missing = set().union(*pairs) - pairs[0] - pairs[-1]
    while missing:
        best = max(range(len(grid)), key=lambda i: len(pairs[i] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen


def _pairs(case: Sequence[Hashable]) -> set[Pair]:
    """Every two values of a case, with their axes."""
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(case), 2)}
