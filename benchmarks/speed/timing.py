"""Times that can be trusted on a machine that is shared: interleaved rounds, CPU time, medians, ratios of the same round.

A clock that runs faster or a neighbour that takes the cache changes all times of a minute, not the ratios within a second. So variants
take turns (A B C, C B A, A B C ...), a ratio is made of two times of the same round, and what is reported is the median of those ratios.
With one thread the CPU time of that thread is read, which does not run while the thread waits for its turn; with more it is wall time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from reelquant.evidence.speed import Spread

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"thread": time.thread_time, "process": time.process_time, "wall": time.perf_counter}
"""``process`` is for runtimes that compute on a thread of their own (OpenVINO): with one of them at work it is the same CPU time."""

LEAST = 0.02  # seconds of one sample; faster functions are repeated within it


def clock_for(threads: int, own_threads: bool = False) -> Clock:
    """The clock to time with: CPU time for one thread, wall time for several."""
    return CLOCKS["wall" if threads > 1 else "process" if own_threads else "thread"]


@dataclass(frozen=True)
class Samples:
    """Seconds of one call of a variant, a value per round."""

    seconds: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        return Spread.of(self.seconds)

    @property
    def median(self) -> float:
        return self.spread.median


def speedup(base: Samples, other: Samples) -> Spread:
    """How many times faster ``other`` is than ``base``: round by round, then the median. 2 means half the time."""
    return Spread.of([mine / its for mine, its in zip(base.seconds, other.seconds, strict=True)])


def _once(function: Callable[[], object], clock: Clock, repeats: int) -> float:
    start = clock()
    for _ in range(repeats):
        function()
    return (clock() - start) / repeats


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1, clock: Clock | Mapping[str, Clock] = time.thread_time,
    least: float = LEAST,
) -> dict[str, Samples]:  # fmt: skip
    """Time functions in turns, forwards in even rounds and backwards in odd ones, after ``warmup`` unrecorded rounds.

    Args:
        functions: what to time, by name.
        rounds: recorded rounds.
        warmup: rounds before them: compilation, caches, page faults. The last one decides how often a fast function is repeated.
        clock: of all, or by name.
        least: seconds that a sample shall last at least.
    """
    clocks = dict(clock) if isinstance(clock, Mapping) else dict.fromkeys(functions, clock)
    repeats = dict.fromkeys(functions, 1)
    for _ in range(warmup):
        for name, function in functions.items():
            took = _once(function, clocks[name], 1)
            repeats[name] = max(1, round(least / took)) if took > 0 else 1
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        for name in list(functions)[:: -1 if number % 2 else 1]:
            seconds[name].append(_once(functions[name], clocks[name], repeats[name]))
    return {name: Samples(tuple(values)) for name, values in seconds.items()}
