"""What was decided for a group of layers: which alternative of every stage, on top of the numbers in their plan rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reelquant.engine.plan import LayerPlan
from reelquant.recipes.entry import Entry
from reelquant.stages import Stage


@dataclass(frozen=True)
class Choice:
    """One alternative per stage.

    Attributes:
        picks: by position of the entry, the number of the alternative.
    """

    picks: tuple[int, ...]

    @classmethod
    def first(cls, entries: Sequence[Entry]) -> Choice:
        """The first alternative of every stage."""
        return cls((0,) * len(entries))

    def stage(self, entry: Entry) -> Stage:
        """The chosen alternative."""
        return entry.alternatives[self.picks[entry.position]]

    def options(self, entry: Entry) -> Mapping[str, Any]:
        """The parameters of the chosen alternative, as the recipe writes them."""
        return entry.options[self.picks[entry.position]]

    def named(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """``{"range_integrate.power": 0.5}``: the chosen parameters, for reports."""
        return {f"{entry.name}.{key}": value for entry in entries for key, value in self.options(entry).items()}

    def digest(self, rows: Sequence[LayerPlan]) -> str:
        """A key for whatever is stored of these layers: names, numbers, and every parameter of every stage that touches them."""
        content = [[row.layer.name, repr(row.specs), [[e.axis, e.name, dict(self.options(e))] for e in row.entries]] for row in rows]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
