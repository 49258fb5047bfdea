import os
from typing import Any

import pytest

from reelquant import CalibrationError, RecipeError
from reelquant.cli.parallel import run_each


class Heard:
    """A lane that remembers."""

    def __init__(self) -> None:
        self.words: list[tuple[Any, ...]] = []

    def about(self, subject: str) -> None:
        self.words.append(("about", subject))

    def phase(self, name: str, total: int) -> None:
        self.words.append(("phase", name, total))

    def advance(self) -> None:
        self.words.append(("advance",))

    def finish(self) -> None:
        self.words.append(("finish",))


def work(job: int, lane: Any) -> tuple[int, int]:
    """Fails for 13, dies for 14, and squares all others."""
    if job == 13:
        raise RecipeError("thirteen")
    if job == 14:
        os._exit(3)
    lane.about(str(job))
    lane.phase("build", job)
    lane.advance()
    lane.finish()
    return job * job, os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_progress_reaches_its_lane(workers: int) -> None:
    lanes = [Heard(), Heard()]
    found = run_each(work, [3, 4], lanes, workers)
    assert [square for square, _ in found] == [9, 16]
    assert [lane.words for lane in lanes] == [[("about", str(n)), ("phase", "build", n), ("advance",), ("finish",)] for n in (3, 4)]
    assert (os.getpid() in {process for _, process in found}) == (workers == 1)


@pytest.mark.parametrize(("job", "error", "words"), [(13, RecipeError, "thirteen"), (14, CalibrationError, "ended with code 3")])
def test_a_failing_worker_is_an_error_here(job: int, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run_each(work, [3, job], [Heard(), Heard()], 2)
