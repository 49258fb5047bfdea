"""What an export did to every layer: carried, requantized, dequantized; and what had to stay behind."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from reelquant._errors import printable
from reelquant._markup import table
from reelquant._numbers import size
from reelquant.checkpoint.export.source import Facts

Fate = Literal["carried", "requantized", "dequantized", "float"]
FATES: dict[Fate, str] = {
    "carried": "the very codes of the artifact",
    "requantized": "rounded a second time",
    "dequantized": "written as floats, which the reader computes with",
    "float": "was float and stays so",
}


@dataclass
class Outcome:
    """How one layer was exported, or one tensor that is not quantized.

    Attributes:
        name: in the artifact.
        fate: one of :data:`FATES`.
        was, becomes: numbers before and after.
        why: why its codes were not carried; empty if they were.
        bytes_before, bytes_after: scales and biases included.
        error: squared difference of the weight that the reader sees and the artifact's, over the latter's square.
    """

    name: str
    fate: Fate
    was: str
    becomes: str
    bytes_before: int
    bytes_after: int
    why: str = ""
    error: float = 0.0


@dataclass(frozen=True, repr=False)
class Exported:
    """The outcome of an export.

    Attributes:
        path: the file or folder.
        format: a name of :data:`reelquant.checkpoint.export.FORMATS`.
        components: what was written.
        names: whose names the tensors have.
        layers: an :class:`Outcome` per layer and per tensor that is not quantized.
        left_behind: what the format cannot hold, and the layers it was in.
        opens_with: how the file is read.
    """

    path: Path
    format: str
    components: tuple[str, ...]
    names: str
    layers: list[Outcome]
    left_behind: dict[str, list[str]] = field(default_factory=dict)
    opens_with: str = ""

    def __repr__(self) -> str:
        return printable(f"Exported({self._title})")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        rows = [(fate, count, FATES[fate]) for fate, count in self._counts.items()]
        return table(self._title, rows, ("", "layers", ""), [f"left behind: {what}" for what in self.left_behind])

    @property
    def _counts(self) -> dict[Fate, int]:
        return {fate: len(self.of(fate)) for fate in FATES}

    @property
    def _title(self) -> str:
        fates = ", ".join(f"{count} {fate}" for fate, count in self._counts.items() if count)
        return f"{self.format} {self.path.name}: {fates or 'nothing'}; {size(self.bytes_before)} -> {size(self.bytes_after)}"

    def of(self, fate: Fate) -> list[Outcome]:
        """Layers of one fate."""
        return [outcome for outcome in self.layers if outcome.fate == fate]

    @property
    def bytes_before(self) -> int:
        return sum(outcome.bytes_before for outcome in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(outcome.bytes_after for outcome in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        counts = self._counts
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return {**asdict(self), "path": str(self.path), "components": list(self.components), "counts": counts, **totals}


def left_behind(layers: dict[str, Facts], *, rounding: str) -> dict[str, list[str]]:
    """What lives in our layers and in no other project's file.

    Args:
        layers: of one component.
        rounding: what becomes of rounded inputs in the reader.
    """
    found = {
        "ranges of inputs per denoising step": [n for n, x in layers.items() if x.layout.slots > 1],
        f"rounding of inputs: {rounding}": [n for n, x in layers.items() if x.layout.input is not None],
        "tables of temporal outputs: the layers are computed in every step": [n for n, x in layers.items() if x.layout.table],
    }
    return {what: names for what, names in found.items() if names}
