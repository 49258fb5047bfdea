"""How loops over rows are shared between threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from reelquant.kernels.cpu import loops

ROWS, LARGE = 10, loops.SMALL + 1


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops.torch, "get_num_threads", lambda: 3)


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The threads that would help have something else to do."""
    free, pool = threading.Event(), ThreadPoolExecutor(1)
    pool.submit(free.wait)
    monkeypatch.setattr(loops, "_pool", lambda threads: pool)
    yield
    free.set()
    pool.shutdown()


def noted(start: int, stop: int, seen: list[tuple[int, threading.Thread]], strange: int) -> bool:
    seen += [(row, threading.current_thread()) for row in range(start, stop)]
    return strange in range(start, stop)


@pytest.mark.parametrize("strange", [-1, 0, 9])
def test_every_row_comes_once_and_answers_are_joined(strange: int) -> None:
    seen: list[tuple[int, threading.Thread]] = []
    assert loops.spread(noted, ROWS, LARGE, seen, strange) == (strange >= 0)
    assert sorted(row for row, _ in seen) == list(range(ROWS))


def test_few_elements_stay_in_the_callers_thread() -> None:
    seen: list[tuple[int, threading.Thread]] = []
    loops.spread(noted, ROWS, loops.SMALL, seen, -1)
    assert seen == [(row, threading.current_thread()) for row in range(ROWS)]


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("strange", [-1, 9])
def test_the_caller_waits_for_no_thread_that_has_not_begun(strange: int) -> None:
    seen: list[tuple[int, threading.Thread]] = []
    assert loops.spread(noted, ROWS, LARGE, seen, strange) == (strange >= 0)
    assert seen == [(row, threading.current_thread()) for row in range(ROWS)]
