"""Which steps to compute: for every number of computed steps the schedule of the least expected damage, from recorded results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from reelquant.reuse.history import weights

Array = np.ndarray
Steps = tuple[int, ...]
RIDGE = 1e-5
"""Of the mean power of the results: keeps weights of least squares small where results are almost alike."""


@dataclass(frozen=True)
class Plan:
    """A schedule, and what is expected of it.

    Attributes:
        steps: numbers of the computed steps; the first step is always among them.
        order: one less than the number of earlier results that a forecast is made from.
        damage: expected squared error of the final latents over their mean square.
    """

    steps: Steps
    order: int
    damage: float

    def pauses(self, count: int) -> Iterator[tuple[Steps, range]]:
        """For every pause the computed steps that forecasts in it are made from, and the steps in it.

        Args:
            count: of the sampler's steps.
        """
        for number, (last, following) in enumerate(zip(self.steps, [*self.steps[1:], count], strict=True)):
            if following > last + 1:
                yield self.steps[max(0, number - self.order) : number + 1], range(last + 1, following)


@dataclass(frozen=True, eq=False)
class Errors:
    """What steps cost that are forecast.

    The squared error of a forecast is a quadratic form of inner products: with weights ``c`` of the results of earlier steps it is
    ``|x_s - sum c_i x_i|^2 = G_ss - 2 c.G_sh + c.G_hh.c``. So recorded results themselves are not needed, only their inner products.

    Attributes:
        timesteps: of the sampler's steps, in sampling order.
        gram: ``[steps, steps]`` inner products of what a stretch gave at each step, summed over clips and calls.
        weight: ``[steps]`` damage to the final latents per squared error of a step's result.
        fitted: whether weights are those of least squares; else those of the polynomial through the results.
    """

    timesteps: Sequence[float]
    gram: Array
    weight: Array
    fitted: bool = False

    @property
    def steady(self) -> Errors:
        """The same with weights that change evenly from step to step, by a line through their logarithms: what single steps did to a few
        clips is noisy."""
        later = np.arange(1, len(self.weight))
        line = np.polynomial.Polynomial.fit(later, np.log(np.maximum(self.weight[1:], 1e-30)), 1)
        return replace(self, weight=np.concatenate([self.weight[:1], np.exp(line(later))]))

    def softened(self, power: float) -> Errors:
        """The same with weights to a power: 1 leaves them, 0 makes errors of all steps count alike. Damages of single steps do not add up
        where one of them is enough to lead a clip elsewhere."""
        return replace(self, weight=np.concatenate([self.weight[:1], np.maximum(self.weight[1:], 1e-30) ** power]))

    def shares(self, history: Steps, steps: Sequence[int]) -> Array:
        """Weights of earlier results in the forecast of each step, ``[steps, history]``."""
        if not self.fitted:
            times = [self.timesteps[step] for step in history]
            return np.array([weights(times, self.timesteps[step]) for step in steps]).reshape(len(steps), len(history))
        within = self.gram[np.ix_(history, history)]
        damped = within + RIDGE * np.trace(within) / len(history) * np.eye(len(history))
        return np.linalg.solve(damped, self.gram[np.ix_(history, steps)]).T

    def of(self, history: Steps, steps: Sequence[int]) -> Array:
        """Damage of forecasting each of ``steps`` from what ``history`` gave: ``[steps]``."""
        rows, chosen = list(history), list(steps)
        shares = self.shares(history, chosen)
        cross = (shares * self.gram[np.ix_(chosen, rows)]).sum(1)
        within = np.einsum("si,ij,sj->s", shares, self.gram[np.ix_(rows, rows)], shares)
        squares = self.gram[chosen, chosen] - 2 * cross + within
        return self.weight[chosen] * squares.clip(min=0)

    def of_pauses(self, history: Steps, end: int) -> Array:
        """Damage of pauses after the last step of ``history``: of none, of one step, ... of all steps before ``end``."""
        single = self.of(history, range(history[-1] + 1, end))
        return np.concatenate([[0.0], np.sqrt(single).cumsum() ** 2])


def plans(errors: Errors, order: int, longest: int | None = None) -> dict[int, Plan]:
    """The best schedule for every number of computed steps, by dynamic programming.

    What steps cost depends on the last ``order + 1`` computed steps. These are the states. Steps that follow each other err alike, so
    within a pause errors are added, and squared then; pauses are taken to err independently of each other.

    Paper: CacheQuant (arXiv 2503.01323), its DP schedule. Deviations: steps are weighted by what their error does to the final latents
    (theirs: the distance of features); errors of a pause add up as said above (theirs: their sum); forecasts of order 1 and 2 are planned
    for, too; groups may have any length up to ``longest`` (theirs: from half to twice the mean).

    Args:
        longest: most steps from one computed step to the next; by default 8, or a third of the steps if that is more.

    Returns:
        The plan by the number of computed steps, as far as ``longest`` lets a schedule have that few.
    """
    count = len(errors.timesteps)
    gap = longest or max(8, count // 3)
    best: dict[Steps, Array] = {(0,): _only(count, 1, 0.0)}
    came: dict[Steps, list[Steps | None]] = {(0,): [None] * (count + 1)}
    ends: list[tuple[Array, Steps]] = []
    by_last: list[list[Steps]] = [[] for _ in range(count)]
    by_last[0].append((0,))
    for last in range(count):
        for history in by_last[last]:
            found = best[history]
            reached = range(last + 1, min(count, last + gap) + 1)
            costs = errors.of_pauses(history, reached[-1]) if reached else ()
            for following, cost in zip(reached, costs, strict=False):
                if following == count:
                    ends.append((found + cost, history))
                else:
                    _step(best, came, by_last, history, (*history, following)[-order - 1 :], cost)
            if not reached:
                ends.append((found, history))
    return dict(_finished(count, order, ends, came))


def _only(count: int, at: int, value: float) -> Array:
    """``[count + 1]``, by the number of computed steps: impossible but for one."""
    found = np.full(count + 1, np.inf)
    found[at] = value
    return found


def _step(best: dict[Steps, Array], came: dict[Steps, list], by_last: list[list[Steps]], old: Steps, new: Steps, cost: float) -> None:
    """One more computed step: keep it for those numbers of computed steps for which it is the best way to its state."""
    reached = np.roll(best[old] + cost, 1)
    reached[0] = np.inf
    if new not in best:
        best[new], came[new] = np.full_like(reached, np.inf), [None] * len(reached)
        by_last[new[-1]].append(new)
    for number in np.flatnonzero(reached < best[new]):
        best[new][number], came[new][number] = reached[number], old


def _finished(count: int, order: int, ends: list[tuple[Array, Steps]], came: dict[Steps, list]) -> Iterator[tuple[int, Plan]]:
    for number in range(1, count + 1):
        damage, state = min(((float(found[number]), state) for found, state in ends), key=lambda one: one[0])
        if np.isfinite(damage):
            yield number, Plan(_traced(state, number, came), order, damage)


def _traced(state: Steps | None, number: int, came: dict[Steps, list]) -> Steps:
    """The computed steps on the way to a state."""
    steps: list[int] = []
    while state is not None:
        steps.append(state[-1])
        state, number = came[state][number], number - 1
    return tuple(reversed(steps))


def flat_weights(errors: Errors, steps: Sequence[int], order: int) -> list[float]:
    """For every step that a schedule does not compute its timestep and the weights of the last ``order + 1`` results, oldest first, all in
    one list; see :attr:`reelquant.reuse.BlockReuse.fitted`."""
    found: list[float] = []
    for history, pause in Plan(tuple(steps), order, 0.0).pauses(len(errors.timesteps)):
        for step, shares in zip(pause, errors.shares(history, pause), strict=True):
            padded = [0.0] * (order + 1 - len(history)) + [round(float(share), 5) for share in shares]
            found += [round(errors.timesteps[step], 4), *padded]
    return found


def even(count: int, number: int) -> Steps:
    """``number`` of ``count`` steps, as evenly spaced as they can be, the first among them."""
    return tuple(sorted({round(i * count / number) for i in range(number)}))


def expected(errors: Errors, steps: Sequence[int], order: int) -> float:
    """The damage that is expected of any schedule."""
    plan = Plan(tuple(steps), order, 0.0)
    return sum(float(errors.of_pauses(history, pause.stop)[-1]) for history, pause in plan.pauses(len(errors.timesteps)))
