"""From what errors do to the output of single calls to rows of the table: weighed by the gains of steps, for steps and halves apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reelquant.allocate.table import EVERY, Damage, Measure, Part
from reelquant.damage.gains import Gains
from reelquant.damage.rounding import Steps
from reelquant.damage.scene import HALVES, Target
from reelquant.evidence import bootstrap


@dataclass(eq=False)
class Seen:
    """Damages to the output of calls, squared error over variance.

    Attributes:
        measure: how they were found.
        target: the denoiser.
        weights, inputs: formats of the columns, those of weights first.
        steps, halves: of the calls.
        values: of every call ``[layers * (weights + inputs)]``, layer after layer.
    """

    measure: Measure
    target: Target
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    steps: list[int] = field(default_factory=list)
    halves: list[int] = field(default_factory=list)
    values: list[Sequence[float]] = field(default_factory=list)

    @property
    def formats(self) -> str:
        """The columns in words: what values under a name are of."""
        return f"weights {', '.join(self.weights)}, inputs {', '.join(self.inputs)}"

    def add(self, step: int, half: int, values: Sequence[float]) -> None:
        """Note a call."""
        self.steps.append(step)
        self.halves.append(half)
        self.values.append(values)

    def rows(self, gains: Gains, ranges: Sequence[tuple[int, int]]) -> list[Damage]:
        """Rows of all layers: at all steps, in ranges of steps, in halves of guidance; and of all inputs together at each single step.

        Errors at different steps, and in different halves, are taken to be independent: what they do adds up.
        """
        table = np.array(self.values).reshape(len(self.values), len(self.target.layers), -1)
        found: list[Damage] = []
        for steps, half in self._cuts(ranges, gains):
            found += self._cut(table, gains, steps, half)
        for step in range(len(self.target.timesteps)) if self.inputs else ():
            found += self._all_inputs(table, gains, step)
        return found

    def _cuts(self, ranges: Sequence[tuple[int, int]], gains: Gains) -> Iterator[tuple[Steps, str | None]]:
        yield None, None
        yield from ((steps, None) for steps in ranges)
        yield from ((None, half) for half in gains.halves)

    def _cut(self, table: np.ndarray, gains: Gains, steps: Steps, half: str | None) -> list[Damage]:
        weighed, numbers = self._weighed(table, gains, steps, half)
        found = []
        for layer, facts in enumerate(self.target.layers):
            for column, (part, written) in enumerate(self._columns()):
                damage, low, high = _interval(weighed[:, layer, column], numbers)
                found.append(Damage(self.target.component, facts.name, part, written, self.measure, damage, low, high, steps, half))
        return found

    def _all_inputs(self, table: np.ndarray, gains: Gains, step: int) -> list[Damage]:
        weighed, numbers = self._weighed(table.sum(1, keepdims=True), gains, (step, step), None)
        found = []
        for column, (part, written) in enumerate(self._columns()):
            if part == "input":
                values = _interval(weighed[:, 0, column], numbers)
                found.append(Damage(self.target.component, EVERY, part, written, self.measure, *values, (step, step)))
        return found

    def _columns(self) -> list[tuple[Part, str]]:
        return [*(("weight", one) for one in self.weights), *(("input", one) for one in self.inputs)]  # type: ignore[list-item]

    def _weighed(self, table: np.ndarray, gains: Gains, steps: Steps, half: str | None) -> tuple[np.ndarray, np.ndarray]:
        """What each call stands for in the sum over steps and halves, ``[calls, ...]``, and the numbers of the calls that count.

        A step that no call was recorded of is stood for by the nearest one that has calls, and a half without calls by all calls.
        """
        names = [next((name for name, value in HALVES.items() if value == one), None) for one in self.halves]
        wanted = range(len(gains.steps)) if steps is None else range(steps[0], steps[1] + 1)
        weights = np.zeros(len(self.values))
        for name in (half,) if half else (tuple(gains.halves) or (None,)):
            mine = [number for number, one in enumerate(names) if name is None or one == name] or range(len(names))
            share = 1.0 if name is None else gains.halves[name]
            for step in wanted:
                near = min(abs(self.steps[number] - step) for number in mine)
                these = [number for number in mine if abs(self.steps[number] - step) == near]
                weights[these] += share * gains.steps[step] / len(these)
        numbers = np.flatnonzero(weights)
        return table * weights.reshape(-1, 1, 1), numbers


def _interval(values: np.ndarray, numbers: np.ndarray) -> tuple[float, float, float]:
    """The sum over the calls that count, and its 95 % interval over calls drawn with replacement."""
    counted: Any = values[numbers] * len(numbers)
    found = bootstrap(counted.tolist(), resamples=200)
    return found.mean, max(found.low, 0.0), found.high
