"""Published ways to leave out work: what the plan asks of each of them, and what was found here.

Run it from the repository root::

    python -m benchmarks.left_out --output benchmarks/results            # the table, from the rows that are there
    python -m benchmarks.left_out --output benchmarks/results --pipeline tiny-unet --clips 16    # speeds, and CacheQuant's joint calibration
    python -m benchmarks.methods                                         # puts the table into docs/methods.md

Most figures are rows of other benchmarks in ``rows.jsonl``: with as many clips as both rows of a gain have. A gain is *passed* if its
mean is at least what was asked and the lower end of its 95 % interval is above zero, *not told* if the mean is enough and the interval
reaches zero. Figures that no row holds stand here with the command that gives them. Tests that show what no clip shows are named, and
the table is not written if one of them does not exist.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

import reelquant
from benchmarks.checks import verdict
from benchmarks.common import Clips, Records, markdown, measure
from benchmarks.tuned import KEPT, RECIPE, quantized, times_in_turns
from reelquant.evidence import bootstrap
from reelquant.recipes.recipe import load_recipe
from reelquant.reuse import installed_reuse
from reelquant.reuse.reuse import put
from reelquant.tuning.recording import site_of

PAGE, ROWS = Path("benchmarks/results/left-out.md"), Path("benchmarks/results/rows.jsonl")
HEADINGS = ("method", "ours", "asked", "on", "found", "clips", "verdict", "why not", "measured by")
SEPARATE, SPEED = "left out: cachequant-w8a8, planned after calibration", "left out: speed of {}"
FAST = ("deepcache", "faster-diffusion")
Rows = Sequence[Mapping[str, Any]]
Told = tuple[str, str, str, str]
"""What was found, on how many clips, the verdict, by what it was measured."""


class Found(Protocol):
    """A figure, or what shows that something holds."""

    def told(self, rows: Rows, pipeline: str) -> Told:
        """In words."""
        ...


MISSING = "-", "-", "not measured"


def _named(rows: Rows, name: str, pipeline: str) -> Iterator[Mapping[str, Any]]:
    """Rows of this name, or of a recipe as it is today: ``recipe qvd-w8a8``; those of most clips first."""
    digest = f"-{load_recipe(name.removeprefix('recipe ')).digest()}" if name.startswith("recipe ") else ""
    own = [row for row in rows if row.get("pipeline") == pipeline and (row["digest"].endswith(digest) if digest else row["name"] == name)]
    yield from sorted((row for row in own if row.get("status") == "measured"), key=lambda row: -row["clips"])


@dataclass(frozen=True)
class Quality:
    """PSNR of a row, dB, to float or to the same pipeline that leaves out nothing."""

    row: str
    least: float
    command: str

    def told(self, rows: Rows, pipeline: str) -> Told:
        row = next((one for one in _named(rows, self.row, pipeline) if "psnr" in one), None)
        if row is None:
            return (*MISSING, self.command)
        words = f"{row['psnr_mean']:.1f} dB ({row['psnr_low']:.1f} to {row['psnr_high']:.1f}; worst {min(row['psnr']):.1f})"
        return words, str(row["clips"]), "passed" if row["psnr_mean"] >= self.least else "missed", self.command


@dataclass(frozen=True)
class Gain:
    """What a row has over another, clip by clip, dB."""

    row: str
    rival: str
    least: float
    command: str

    def told(self, rows: Rows, pipeline: str) -> Told:
        others = {(row["digest"][:12], row["clips"]): row for row in _named(rows, self.rival, pipeline) if "psnr" in row}
        for row in _named(rows, self.row, pipeline):
            if (other := others.get((row["digest"][:12], row["clips"]))) is not None:
                gain = bootstrap([a - b for a, b in zip(row["psnr"], other["psnr"], strict=True)])
                said = verdict(self.least, gain.mean, gain.low)
                return f"{gain.mean:+.1f} dB ({gain.low:+.1f} to {gain.high:+.1f})", str(row["clips"]), said, self.command
        return (*MISSING, self.command)


@dataclass(frozen=True)
class Speed:
    """How many times faster a clip is than with the same quantized pipeline that leaves out nothing."""

    recipe: str
    least: float

    def told(self, rows: Rows, pipeline: str) -> Told:
        command = f"`left_out --pipeline {pipeline}`"
        row = next(_named(rows, SPEED.format(self.recipe), pipeline), None)
        if row is None:
            return (*MISSING, command)
        middle = statistics.median(row["ratios"])
        words = f"{middle:.2f} times ({min(row['ratios']):.2f} to {max(row['ratios']):.2f}), CPU time"
        return words, "1", "passed" if middle >= self.least else "missed", command


@dataclass(frozen=True)
class Figure:
    """A figure that no row holds, and where it stands or what gives it."""

    words: str
    clips: str
    verdict: str
    command: str

    def told(self, rows: Rows, pipeline: str) -> Told:
        return self.words, self.clips, self.verdict, self.command


@dataclass(frozen=True)
class Shown:
    """A test: ``tests/unit/reuse/test_blocks.py::test_name``."""

    test: str
    words: str = "holds"

    def told(self, rows: Rows, pipeline: str) -> Told:
        file, _, name = self.test.partition("::")
        if f"def {name}(" not in Path(file).read_text(encoding="utf-8"):
            raise SystemExit(f"there is no test {self.test}")
        return self.words, "-", "passed", f"`{self.test}`"


@dataclass(frozen=True)
class Line:
    """One thing that is asked of a method."""

    method: str
    ours: str
    asked: str
    found: Found
    on: str = ""
    why: str = ""


DIT, UNET = "tiny-dit", "tiny-unet"
TUNED, ATTENTION, LIBRARY, REMOVAL = "`tuned`", "`attention_reuse`", "`library`", "`removal`"
BEST, EVEN, LAST = (
    "tuned planned, fitted weights of two, 10 steps",
    "tuned even, fitted weights of two, 10 steps",
    "tuned planned, last result repeated, 10 steps",
)
OF_FLOAT = "tuned planned on the float pipeline, fitted weights of two, 10 steps"
BLOCKS, PLACES = "tests/unit/reuse/test_blocks.py", "tests/unit/reuse/test_attention.py"
CACHE, NOISY = "`cachequant-w8a8`, `reelquant tune`", "damages of single steps on four clips are noisy there; from twelve clips the plan gains 2.0 dB more"
LINES: tuple[Line, ...] = (
    Line("CacheQuant", CACHE, "the schedule at half of the blocks: +1 dB over even spacing", Gain(BEST, EVEN, 1.0, TUNED), DIT),
    Line("CacheQuant", CACHE, "the schedule at half of the blocks: +1 dB over even spacing", Gain(BEST, EVEN, 1.0, TUNED), UNET, NOISY),
    Line("CacheQuant", CACHE, "the repair at half of the blocks: +1 dB over the last result", Gain(BEST, LAST, 1.0, TUNED), DIT),
    Line("CacheQuant", CACHE, "the repair at half of the blocks: +1 dB over the last result", Gain(BEST, LAST, 1.0, TUNED), UNET),
)
