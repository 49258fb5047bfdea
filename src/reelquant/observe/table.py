"""The statistics that a method may ask for, by name."""

from __future__ import annotations

from reelquant._errors import RecipeError, nearest
from reelquant.observe.channel_range import ChannelRange
from reelquant.observe.features import Features
from reelquant.observe.frame_energy import FrameEnergy
from reelquant.observe.gram import Gram
from reelquant.observe.half_ranges import HalfRanges
from reelquant.observe.rotated_range import RotatedRange
from reelquant.observe.rows import Rows
from reelquant.observe.statistic import Statistic

STATISTICS: dict[str, type[Statistic]] = {
    "range": ChannelRange,
    "rotated": RotatedRange,
    "rows": Rows,
    "gram": Gram,
    "features": Features,
    "halves": HalfRanges,
    "frames": FrameEnergy,
}


def register_statistic(name: str, kind: type[Statistic]) -> None:
    """Add a statistic of another package, so that stages can ask for it by name.

    Raises:
        RecipeError: if the name is taken by another statistic, or holds a dot.
    """
    taken = STATISTICS.get(name)
    if taken not in (None, kind):
        raise RecipeError(f"the statistic '{name}' is {taken.__name__} already; register {kind.__name__} under another name")
    if "." in name:
        raise RecipeError(f"the statistic '{name}' cannot be registered: dots separate it from its tensors; use a name without one")
    STATISTICS[name] = kind


def statistic(name: str) -> type[Statistic]:
    """The statistic of this name.

    Raises:
        RecipeError: if there is none.
    """
    if name not in STATISTICS:
        raise RecipeError(f"no statistic is called '{name}': {nearest(name, STATISTICS)}")
    return STATISTICS[name]
