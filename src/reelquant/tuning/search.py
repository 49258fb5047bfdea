"""Which schedule to take: the fastest that keeps the limits, or the best that is fast enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from reelquant._errors import RecipeError, UnsupportedError
from reelquant.evidence.gate import check_preset, parse_limits
from reelquant.reuse import BlockReuse
from reelquant.reuse.plans import Errors, Plan, flat_weights, plans
from reelquant.tuning.recording import Seconds
from reelquant.tuning.trials import Trial, Trials

VARIANTS = ((1, False), (1, True), (0, False))
"""What is tried for a number of computed steps: forecasts from the last two results and from the last one (a third brought nothing on the
bundled pipelines), and whether the schedule is planned with the damage of every step as it was measured, or as an even trend."""


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
        found: those that were made, by the number of computed steps and the number of the variant.
        planned: the best schedules of every variant, by the number of computed steps.
    """

    stretch: tuple[float, ...]
    errors: Errors
    seconds: Seconds
    trials: Trials
    found: dict[tuple[int, int], Trial] = field(default_factory=dict)
    planned: dict[int, dict[int, Plan]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = {False: self.errors, True: self.errors.steady}
        self.planned = {variant: plans(kinds[steady], order) for variant, (order, steady) in enumerate(VARIANTS)}

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

    def tried(self, number: int, variant: int) -> Trial:
        """The trial of the best schedule of a variant with so many computed steps."""
        if (number, variant) not in self.found:
            plan, order = self.planned[variant][number], VARIANTS[variant][0]
            self.found[number, variant] = self.trials.run(self.stage(plan.steps, order), plan.steps, self.steps, self.speedup(number))
        return self.found[number, variant]

    def tried_all(self) -> tuple[Trial, ...]:
        """Every trial, from the most computed steps to the fewest."""
        return tuple(self.found[key] for key in sorted(self.found, key=lambda one: (-one[0], one[1])))

    def all_of(self, number: int) -> Iterator[Trial]:
        """Trials of all variants, the one that promises most first; schedules that are the same are tried once."""
        seen = set()
        for variant, (order, _) in enumerate(VARIANTS):
            plan = self.planned[variant].get(number)
            if plan is not None and (order, plan.steps) not in seen:
                seen.add((order, plan.steps))
                yield self.tried(number, variant)

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
