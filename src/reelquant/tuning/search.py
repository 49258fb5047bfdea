"""Which schedule to take: the fastest that keeps the limits, or the best that is fast enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from reelquant._errors import RecipeError, UnsupportedError
from reelquant.evidence.gate import check_preset, parse_limits
from reelquant.reuse import BlockReuse
from reelquant.reuse.plans import Errors, Plan, Steps, even, flat_weights, plans
from reelquant.tuning.recording import Seconds
from reelquant.tuning.sampled import Sample, by_fit
from reelquant.tuning.trials import Trial, Trials

MEASURED = "as measured"
KINDS: Mapping[str, Callable[[Errors], Errors]] = {
    MEASURED: lambda errors: errors,
    "even trend": lambda errors: errors.steady,
    "half of the trend": lambda errors: errors.steady.softened(0.5),
    "all alike": lambda errors: errors.softened(0.0),
}
"""How damages of single steps are taken when schedules are planned. On some models they say which steps matter. On others one early step is
enough to lead a clip elsewhere, and what single steps do says little about many."""
VARIANTS = 3
"""Schedules that are tried for a number of computed steps: two from the last two results (a third brought nothing on the bundled
pipelines), and one from the last result alone."""
SHARES = (0.5, 0.4, 0.6)
"""Of the steps: so many are computed in the schedules that are sampled first."""


@dataclass(frozen=True)
class Goal:
    """What is wanted.

    Attributes:
        speedup: of a whole clip, at least; the best quality that is so fast is chosen.
        gate: preset that trials have to pass; the fastest schedule that passes is chosen. Only without ``speedup``.
        limits: further limits, by metric.
    """

    speedup: float | None = None
    gate: str | None = "default"
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def preset(self) -> str | None:
        """The gate that trials have to pass; none where a speed is wanted."""
        return self.gate if self.speedup is None else None

    def __post_init__(self) -> None:
        if self.speedup is not None and not self.speedup > 1:
            raise RecipeError(f"target_speedup is above 1, like 1.8, got {self.speedup}")
        if self.gate is not None:
            check_preset(self.gate)
        parse_limits(self.limits)


@dataclass
class Search:
    """Schedules of one pipeline, and those that were tried.

    Attributes:
        stretch: of the blocks.
        errors: what schedules are planned with.
        seconds: of calls of the denoiser.
        trials: makes them.
        found: those that were made, by the computed steps and the order of the forecasts.
        kinds: the errors as they may be taken, the kind that is believed most first.
        planned: the best schedules of every kind from two results, and of every kind from one, by the number of computed steps.
    """

    stretch: tuple[float, ...]
    errors: Errors
    seconds: Seconds
    trials: Trials
    found: dict[tuple[Steps, int], Trial] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    planned: dict[tuple[str, int], dict[int, Plan]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.planned = {(name, order): plans(kind(self.errors), order) for name, kind in KINDS.items() for order in (1, 0)}

    @property
    def steps(self) -> int:
        """Of a clip."""
        return len(self.errors.timesteps)

    @property
    def fewest(self) -> int:
        """Computed steps of the shortest schedule."""
        return max(2, min(min(known) for known in self.planned.values()))

    def stage(self, computed: Sequence[int], order: int) -> BlockReuse:
        """The reuse that computes these steps."""
        times = self.errors.timesteps
        fitted = flat_weights(self.errors, computed, order) if self.errors.fitted else ()
        at = tuple(round(times[step], 4) for step in computed)
        return BlockReuse(at=at, stretch=self.stretch, order=order, fitted=tuple(fitted))

    def speedup(self, number: int) -> float:
        """Expected of a clip in which so many steps are computed."""
        return self.seconds.speedup(self.steps, number)

    def proposals(self, most: int) -> list[Steps]:
        """Schedules from two results whose sampling tells the kinds of errors apart: plans of all kinds and even spacing, for half of the
        steps first."""
        counts = dict.fromkeys(max(round(share * self.steps), self.fewest) for share in SHARES)
        found = (plan for number in counts for plan in (even(self.steps, number), *self._plans(number, 1)))
        return list(dict.fromkeys(found))[:most]

    def believe(self, samples: Sequence[Sample]) -> None:
        """Order the kinds of errors by how well they expect what was sampled."""
        self.kinds = by_fit({name: kind(self.errors) for name, kind in KINDS.items()}, samples)

    def tried(self, computed: Steps, order: int) -> Trial:
        """The trial of a schedule."""
        if (computed, order) not in self.found:
            self.found[computed, order] = self.trials.run(self.stage(computed, order), computed, self.steps, self.speedup(len(computed)))
        return self.found[computed, order]

    def tried_all(self) -> tuple[Trial, ...]:
        """Every trial, from the most computed steps to the fewest."""
        return tuple(sorted(self.found.values(), key=lambda one: (-len(one.computed), -one.order)))

    def all_of(self, number: int) -> Iterator[Trial]:
        """Trials of so many computed steps, the one that promises most first; schedules that are the same are tried once."""
        two, one = list(dict.fromkeys(self._plans(number, 1))), list(self._plans(number, 0))
        for computed, order in [*((steps, 1) for steps in two[: VARIANTS - 1]), *((steps, 0) for steps in one[:1])]:
            yield self.tried(computed, order)

    def _plans(self, number: int, order: int) -> Iterator[Steps]:
        """The schedule of every kind of errors with so many computed steps, if there is one."""
        known = (self.planned[kind, order].get(number) for kind in self.kinds)
        return (plan.steps for plan in known if plan is not None)

    def fastest(self) -> Trial | None:
        """The trial with the fewest computed steps that keeps the limits: by bisection, as quality falls with the steps."""
        passes, fails, best = self.steps, self.fewest - 1, None
        while passes - fails > 1:
            number = (passes + fails) // 2
            passing = next((trial for trial in self.all_of(number) if trial.passed), None)
            if passing is None:
                fails = number
            else:
                passes, best = number, passing
        return best

    def fast_enough(self, wanted: float, measured: Callable[[Trial], float]) -> Trial:
        """The best trial that reaches a speed.

        Raises:
            UnsupportedError: if no schedule does.
        """
        number = next((number for number in range(self.steps - 1, self.fewest - 1, -1) if self.speedup(number) >= wanted), None)
        while number is not None and number >= self.fewest:
            best = max(self.all_of(number), key=lambda one: one.figures["psnr"])
            if measured(best) >= wanted:
                return best
            number -= 1
        raise UnsupportedError(
            f"no schedule of {self.steps} steps makes a clip {wanted:.2f} times as fast: {self.fewest} computed steps, the fewest that are "
            f"tried, are expected to give {self.speedup(self.fewest):.2f}, and {self.seconds.outside(self.steps):.0%} of a clip's time is "
            "not spent in the denoiser; wish for less, or make clips in more steps"
        )
