"""What recipes cost in quality, where it was measured: clips of the bundled pipelines, ``benchmarks/results``. Nothing is carried over
to other models."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from reelquant.models.pipelines import BUNDLED

FILE = "measured.json"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Measured:
    """PSNR of clips to those of the float pipeline.

    Attributes:
        mean, low, high: dB, with a 95 % interval over the clips.
        clips: how many.
    """

    mean: float
    low: float
    high: float
    clips: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} dB"


@functools.cache
def _table() -> dict[str, dict[str, Measured]]:
    text = resources.files("reelquant.planning").joinpath(FILE).read_text(encoding="utf-8")
    return {model: {name: Measured(**row) for name, row in rows.items()} for model, rows in json.loads(text).items()}


def measured(model: str | Path, recipe: str) -> Measured | None:
    """What was measured of a recipe for the denoiser of a bundled pipeline; None for everything else."""
    return _table().get(str(model), {}).get(recipe) if str(model) in BUNDLED else None
