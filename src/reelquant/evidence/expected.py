"""How long an evaluation will take: told as soon as the first steps were timed, and again where it turns out otherwise.

It hears the progress before it is shown, so sampling knows nothing of it. The second step of the first call gives the
time of a step. The end of that call gives the time of decoding and writing, and a look at its first clip that of measuring.
The quantized pipeline and the floor count like the float one until a step of their own was timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from reelquant._numbers import count, duration
from reelquant._progress import Progress, tell

OFF = 1.25  # another total is told if it differs by this factor


class Expected:
    """A :class:`reelquant._progress.Progress` that estimates the whole time.

    Args:
        heard: who shows the progress.
        calls: pipeline calls that are still to be made, by the name of their phase.
        measured: how many clips are measured after sampling.
        look: measures a clip of the first call and returns the seconds it took; None leaves measuring out.
        more: calls that follow and do not belong to this evaluation: those of further tests, of a benchmark.
        now: a clock, in seconds.

    Attributes:
        seconds: the total that was told last; None if nothing was sampled.
    """

    def __init__(
        self,
        heard: Progress,
        calls: Mapping[str, int],
        measured: int = 0,
        look: Callable[[], float] | None = None,
        more: float = 0.0,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.seconds: float | None = None
        self._heard, self._calls, self._measured, self._look, self._more, self._now = heard, dict(calls), measured, look, more, now
        self._phase, self._done, self._last = "", 0, now()
        self._steps = 0  # of a call of this phase; 0 where no clips are made
        self._steps_of_first = 0
        self._step: dict[str, float] = {}  # seconds of a step, by phase
        self._around: float | None = None  # seconds of a call after its last step
        self._measuring = 0.0  # seconds to measure a clip

    def phase(self, name: str, total: int) -> None:
        """A new phase; those of sampling tell how many steps a call has."""
        self._call_ends(self._now() - self._last)
        calls = self._calls.get(name, 0)
        self._phase, self._done, self._steps = name, 0, total // calls if calls else 0
        self._heard.phase(name, total)
        self._last = self._now()

    def advance(self) -> None:
        """One step more."""
        self._heard.advance()
        took = self._now() - self._last
        self._done += 1
        if self._steps and self._done == min(2, self._steps):  # the first step may compile and pack
            self._step[self._phase] = took
            self._steps_of_first = self._steps_of_first or self._steps
            self._told()
        elif self._steps and self._done == self._steps + 1:  # the next call has begun
            self._call_ends(took - self._step[self._phase])
        self._last = self._now()

    def tell(self, sentence: str) -> None:
        """Handed on to what shows the progress."""
        tell(self._heard, sentence)

    def _call_ends(self, after_its_steps: float) -> None:
        if self._around is not None or not self._steps or self._done < self._steps:
            return
        self._around = max(0.0, after_its_steps)
        self._measuring = self._look() if self._look is not None else 0.0
        self._told(anyway=True)

    def _told(self, anyway: bool = False) -> None:
        """Tell the total if it is news."""
        total, before = self._total(), self.seconds
        if before is not None and not anyway and before / OFF <= total <= before * OFF:
            return
        self.seconds = total
        calls = sum(self._calls.values()) + round(self._more)
        how = f"{count(calls, 'call')} of {count(self._steps_of_first, 'step')}, {self._step[self._phase]:.2g} s a step"
        how += f", {self._measuring:.2g} s to measure a clip" if self._measuring else ""
        rest = "; decoding and measuring come on top" if self._around is None else ""
        tell(self._heard, f"{'about' if before is None else 'now about'} {duration(total)} in all: {how}{rest}")

    def _total(self) -> float:
        """Seconds, as far as their parts are known."""
        usual, around = next(iter(self._step.values())), self._around or 0.0
        sampling = sum(calls * (self._step.get(name, usual) * self._steps_of_first + around) for name, calls in self._calls.items())
        more = self._more * (usual * self._steps_of_first + around)
        return sampling + more + self._measured * self._measuring
