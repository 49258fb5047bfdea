"""Which mode a site of attention has at which step: by the rules of a recipe, or by a table that was chosen while calibrating."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from reelquant._errors import RecipeError, SiteError
from reelquant.reuse.attention.mode import Mode
from reelquant.reuse.attention.modes import parse_mode
from reelquant.reuse.schedule import TOLERANCE, Schedule
from reelquant.reuse.trajectory import Trajectory
from reelquant.sites import AttentionSite, select

SCHEDULE = ("every", "first", "at")


class Rule(NamedTuple):
    """A mode for some sites: at all steps that the schedule does not compute. Without a mode everything is computed.

    Attributes:
        on: a pattern over the modules that ask for attention.
    """

    on: str
    mode: Mode | None
    schedule: Schedule


def parse_rule(number: int, words: Mapping[str, Any]) -> Rule:
    """A rule from ``{"on": "role:self", "mode": "window", "window": 0.5, "every": 2, "first": 2}``.

    Raises:
        RecipeError: naming the rule and what is wrong with it.
    """
    where = f"rules.{number} of reuse 'attention'"
    if not isinstance(words.get("on"), str):
        raise RecipeError(f"{where} names its places like {{'on': 'role:self', 'mode': 'share'}}, got {dict(words)!r:.100}")
    options = {key: words[key] for key in SCHEDULE if key in words}
    if any(type(options.get(key, 1)) is not int for key in ("every", "first")) or not _times(options.get("at", ())):
        raise RecipeError(f"{where}: 'every' and 'first' are whole numbers and 'at' is a list of timesteps, got {options}")
    mode = parse_mode(where, {key: value for key, value in words.items() if key not in ("on", *SCHEDULE)})
    try:
        return Rule(words["on"], mode, Schedule(**options | {"at": tuple(options.get("at", ()))}))
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _times(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(one) in (int, float) for one in value)


def ruled(rules: Sequence[Rule], sites: Sequence[AttentionSite]) -> dict[str, int]:
    """The number of the rule that holds at every site: the last one that names it.

    Raises:
        SiteError: if a rule names none.
    """
    found: dict[str, int] = {}
    for number, rule in enumerate(rules):
        try:
            found |= dict.fromkeys(select(rule.on, sites, "attention sites"), number)
        except SiteError as error:
            raise SiteError(f"rules.{number}.on of reuse 'attention': {error}") from None
    return found


class Course(Protocol):
    """What a site does in the course of a clip."""

    @property
    def modes(self) -> tuple[Mode, ...]:
        """All that it has at some step."""
        ...

    def mode(self, trajectory: Trajectory) -> Mode | None:
        """That of the running step; None: attention is computed."""
        ...

    def upcoming(self, trajectory: Trajectory) -> tuple[Mode, ...]:
        """What a computed step has to keep something for: the modes before the next computed one."""
        ...


@dataclass(frozen=True)
class ByRule:
    """One mode between the steps of a schedule."""

    rule: Rule

    @property
    def modes(self) -> tuple[Mode, ...]:
        return () if self.rule.mode is None or self.rule.schedule == Schedule(1) else (self.rule.mode,)

    def mode(self, trajectory: Trajectory) -> Mode | None:
        computes = self.rule.schedule.computes(trajectory.step, trajectory.timestep, trajectory.before)
        return None if computes else self.rule.mode

    def upcoming(self, trajectory: Trajectory) -> tuple[Mode, ...]:
        schedule = self.rule.schedule
        lasting = any(mode.lasting for mode in self.modes)
        return () if not lasting and not schedule.at and schedule.computes(trajectory.step + 1) else self.modes


@dataclass(frozen=True)
class ByTable:
    """A mode for every calibrated step, or None.

    A sampler with other steps gets what the nearest calibrated step has, and computes at the first step that reaches the next one that is
    computed.
    """

    timesteps: tuple[float, ...]
    cells: tuple[Mode | None, ...]

    @cached_property
    def modes(self) -> tuple[Mode, ...]:
        return tuple(dict.fromkeys(cell for cell in self.cells if cell is not None))

    @cached_property
    def schedule(self) -> Schedule:
        """When everything is computed."""
        return Schedule(at=tuple(time for time, cell in zip(self.timesteps, self.cells, strict=True) if cell is None))

    def mode(self, trajectory: Trajectory) -> Mode | None:
        if self.schedule.computes(trajectory.step, trajectory.timestep, trajectory.before):
            return None
        return self.cells[min(range(len(self.cells)), key=lambda one: abs(self.timesteps[one] - trajectory.timestep))]

    def upcoming(self, trajectory: Trajectory) -> tuple[Mode, ...]:
        now = trajectory.timestep
        rest = [cell for time, cell in zip(self.timesteps, self.cells, strict=True) if time < now - TOLERANCE * abs(now)]
        pause = itertools.takewhile(lambda cell: cell is not None, rest)
        later = (cell for cell in rest if cell is not None and cell.lasting)
        return tuple(dict.fromkeys(cell for cell in itertools.chain(pause, later) if cell is not None))
