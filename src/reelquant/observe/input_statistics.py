"""All statistics of one input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from reelquant._errors import CalibrationError
from reelquant.observe.call import Call
from reelquant.observe.channel_range import ChannelRange
from reelquant.observe.features import Features
from reelquant.observe.geometry import Geometry
from reelquant.observe.gram import Gram
from reelquant.observe.half_ranges import HalfRanges
from reelquant.observe.rotated_range import RotatedRange
from reelquant.observe.rows import Rows
from reelquant.observe.statistic import Statistic, Watched, absorb_each, look_each
from reelquant.observe.table import STATISTICS, statistic

ALWAYS = frozenset({"range", "rows"})  # gathered for every input


@dataclass
class InputStatistics:
    """The statistics of one input tensor, as one sampling pass left them.

    Attributes:
        name: the layer that reads the input; the first one if several do.
        geometry: of that layer.
        members: the statistics that were gathered, by their names in :data:`reelquant.observe.STATISTICS`.
    """

    name: str
    geometry: Geometry
    members: dict[str, Statistic]

    @classmethod
    def for_input(cls, of: Watched) -> InputStatistics:
        """Empty statistics: the wanted ones that make sense for the input, the range and rows in any case.

        Raises:
            RecipeError: if a wanted statistic does not exist.
        """
        for name in of.wanted:
            statistic(name)
        made = {name: kind.for_input(of) for name, kind in STATISTICS.items() if name in of.wanted | ALWAYS}
        return cls(of.name, of.geometry, {name: member for name, member in made.items() if member is not None})

    def get(self, name: str) -> Any:
        """The statistic of this name; None if it was not gathered."""
        return self.members.get(name)

    @property
    def range(self) -> ChannelRange:
        """Ranges of the channels."""
        return self.members["range"]

    @property
    def rotated(self) -> RotatedRange | None:
        """Ranges of the rotated channels."""
        return self.get("rotated")

    @property
    def rows(self) -> Rows | None:
        """Sampled patches."""
        return self.get("rows")

    @property
    def gram(self) -> Gram | None:
        """Moments of patches."""
        return self.get("gram")

    @property
    def features(self) -> Features | None:
        """The input of a temporal layer at every step."""
        return self.get("features")

    @property
    def halves(self) -> HalfRanges | None:
        """Ranges of each half of a guidance pair."""
        return self.get("halves")

    def look(self, x: Tensor, call: Call) -> dict[str, Tensor]:
        """What all members have to remember of one input: ``range.low``, ``rows.rows``, ``halves.first.range.low`` ..."""
        return look_each(self.members, x, call)

    def absorb(self, seen: Mapping[str, Tensor], call: Call) -> None:
        """Add one look to all members."""
        absorb_each(self.members, seen, call)

    def update(self, x: Tensor, call: Call) -> None:
        """Look and absorb."""
        for member in self.members.values():
            member.update(x, call)

    def serves(self, of: Watched) -> bool:
        """True if these statistics, gathered earlier, hold everything that an input wants now."""
        return all(self._serves(name, of) for name in of.wanted | ALWAYS)

    def _serves(self, name: str, of: Watched) -> bool:
        member = self.get(name)
        return statistic(name).for_input(of) is None if member is None else member.serves(of)

    @property
    def apart(self) -> bool:
        """True if each half of a guidance pair was seen at every step."""
        return self.halves is not None and all(half.range.seen == self.range.seen for half in self.halves)

    def bad_from(self) -> float:
        """The first step at which a value was NaN or infinite; infinity if none was."""
        return self.range.bad_from()

    def check(self, timesteps: list[float]) -> None:
        """Refuse statistics that are missing or not finite.

        Raises:
            CalibrationError: with the layer, and the step.
        """
        if not self.range.seen:
            raise CalibrationError(
                f"layer '{self.name}' never ran while sampling (or only on empty inputs), so its input is unknown; skip it"
            )
        step = self.bad_from()
        if step < len(timesteps):
            raise CalibrationError(
                f"the input of layer '{self.name}' holds NaN or inf at step {step:g} (timestep {timesteps[int(step)]:g}); "
                "check the weights, or run the pipeline in float32 or bfloat16 instead of float16"
            )
