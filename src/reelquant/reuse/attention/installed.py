"""Attention that is reused on a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from reelquant.nn import AttentionCall
from reelquant.nn.around.attention_running import Where
from reelquant.reuse.attention.courses import Course
from reelquant.reuse.attention.following import Following
from reelquant.reuse.attention.mode import Mode
from reelquant.reuse.trajectory import Trajectory


class InstalledAttention(Following):
    """A denoiser's attention, computed where its courses say so.

    Args:
        model: the denoiser.
        facts: names of its arguments ``timestep`` and ``latent``.
        courses: what every site does; other sites compute.
    """

    def __init__(self, model: nn.Module, facts: Mapping[str, Any], courses: Mapping[str, Course]) -> None:
        self.courses = dict(courses)
        self.counted: Counter[tuple[str, str, int]] = Counter()  # multiplications: all or made, module, step
        super().__init__(model, facts, courses)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.counted = Counter()

    def attend(self, call: AttentionCall, where: Where) -> Tensor:
        found = self.placed(call, where)
        if found is None:
            step = 0 if self.now.trajectory is None else self.now.trajectory.step
            self._count(where, step, call.multiplications, call.multiplications)
            return self.compute(call, where)
        place, trajectory = found
        course = self.courses[self.names[where.row]]
        mode = self._mode(where.row, course, trajectory)
        output = None if mode is None else mode.attend(place)
        if output is None:
            output = place.compute(call)
            for one in course.upcoming(trajectory):
                one.keep(place, output)
        self._count(where, trajectory.step, call.multiplications, place.multiplied)
        return output

    def _mode(self, row: int, course: Course, trajectory: Trajectory) -> Mode | None:
        key = "mode of", row
        step, mode = trajectory.notes.get(key, (None, None))
        if step != trajectory.step:
            mode = course.mode(trajectory)
            trajectory.notes[key] = trajectory.step, mode
        return mode

    def _count(self, where: Where, step: int, every: int, made: int) -> None:
        site = self.names[where.row]
        self.counted["all", site, step] += every
        self.counted["made", site, step] += made

    def reset(self) -> None:
        super().reset()
        self.counted.clear()

    def counts(self) -> dict[str, int]:
        """Multiplications that were made, and those that were saved. What modes compute beside attention counts as made."""
        pairs = self.by_step().values()
        return {"computed": sum(made for made, _ in pairs), "reused": sum(saved for _, saved in pairs)}

    def by_step(self) -> dict[int, tuple[int, int]]:
        """The same by the number of the step. A step that prepares others may save less than nothing."""
        return {step: self._counts(step=step) for step in sorted({step for *_, step in self.counted})}

    def by_part(self) -> dict[str, tuple[int, int]]:
        """The same by module, of :attr:`parts`."""
        return {site: self._counts(site=site) for site in self.parts}

    def by_cell(self) -> dict[str, dict[int, tuple[int, int]]]:
        """The same by module, of :attr:`parts`, and step."""
        steps = sorted({step for *_, step in self.counted})
        return {site: {step: self._counts(site, step) for step in steps if self.counted["all", site, step]} for site in self.parts}

    def _counts(self, site: str | None = None, step: int | None = None) -> tuple[int, int]:
        known = [(kind, count) for (kind, name, at), count in self.counted.items() if site in (None, name) and step in (None, at)]
        every, made = (sum(count for kind, count in known if kind == word) for word in ("all", "made"))
        return made, every - made

    @property
    def parts(self) -> list[str]:
        """Modules whose attention is not always computed."""
        return [site for site, course in self.courses.items() if course.modes]
