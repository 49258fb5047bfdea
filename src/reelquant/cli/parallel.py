"""The same work on several things, each in a process of its own, with progress bars that stay in this one."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from reelquant._errors import CalibrationError
from reelquant.cli.signals import TERMINATED

POLL, GRACE = 0.2, 30.0  # seconds: between looks at a channel, for a process that is done to end


class Lane(Protocol):
    """Receives the progress of one piece of work."""

    def about(self, subject: str) -> None: ...

    def phase(self, name: str, total: int) -> None: ...

    def advance(self) -> None: ...

    def finish(self) -> None: ...


class Sender:
    """A lane in another process: it sends its calls to the real one."""

    def __init__(self, number: int, channel: Any) -> None:
        self._number, self._channel = number, channel

    def _tell(self, what: str, *words: Any) -> None:
        self._channel.put((self._number, what, words))

    def about(self, subject: str) -> None:
        self._tell("about", subject)

    def phase(self, name: str, total: int) -> None:
        self._tell("phase", name, total)

    def advance(self) -> None:
        self._tell("advance")

    def finish(self) -> None:
        self._tell("finish")


def run_each(work: Callable[[Any, Any], Any], jobs: Sequence[Any], lanes: Sequence[Lane], workers: int) -> list[Any]:
    """``work(job, lane)`` for every job, in order or all at once.

    Args:
        work: a function at the top of a module.
        jobs: picklable.
        lanes: one per job.
        workers: 1 works here, one after the other; more gives every job its own process.

    Returns:
        Results in the order of the jobs.

    Raises:
        Exception: the first that a job raised; the others are stopped.
    """
    if workers == 1:
        return [work(job, lane) for job, lane in zip(jobs, lanes, strict=True)]
    context = multiprocessing.get_context("spawn")
    channel = context.Queue()
    processes = [context.Process(target=_process, args=(work, job, number, channel), daemon=True) for number, job in enumerate(jobs)]
    ending: set[int] = set()
    try:
        for process in processes:
            process.start()
        return _listen(processes, lanes, channel, ending)
    finally:
        for number, process in enumerate(processes):
            if number in ending:
                process.join(GRACE)  # what is stopped while it ends leaves its semaphores behind
            if process.is_alive():
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join()


def _process(work: Callable[[Any, Any], Any], job: Any, number: int, channel: Any) -> None:
    from reelquant.cli.console import quiet_libraries

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # unwinds, so that semaphores are given back
    quiet_libraries()
    try:
        channel.put((number, "result", (work(job, Sender(number, channel)),)))
    except Exception as error:
        channel.put((number, "error", (error,)))


def _listen(processes: Sequence[Any], lanes: Sequence[Lane], channel: Any, ending: set[int]) -> list[Any]:
    """Pass progress on until every result is there; ``ending`` gets the numbers of the processes whose work is over."""
    results: dict[int, Any] = {}
    while len(results) < len(processes):
        try:
            number, what, words = channel.get(timeout=POLL)
        except queue.Empty:
            _check(processes, results)
            continue
        if what in ("error", "result"):
            ending.add(number)
        if what == "error":
            raise words[0]
        if what == "result":
            results[number] = words[0]
        else:
            getattr(lanes[number], what)(*words)
    return [results[number] for number in range(len(processes))]


def _check(processes: Sequence[Any], results: dict[int, Any]) -> None:
    for number, process in enumerate(processes):
        if number not in results and process.exitcode is not None:
            raise CalibrationError(f"a worker process ended with code {process.exitcode} and no result; is there memory enough?")
