"""Draw a training's figures: ``python training/plot.py training/curves/tiny-dit.csv`` writes a PNG of the same name."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(path: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Figures by stage and name, as (minutes, value); a file without a ``stage`` column is one stage."""
    stages: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            stage = stages.setdefault(row.pop("stage", path.stem), {})
            minutes = float(row.pop("seconds")) / 60
            row.pop("step", None)
            for name, value in row.items():
                if value:
                    stage.setdefault(name, []).append((minutes, float(value)))
    return stages


def gather(stages: dict[str, Path], path: Path, columns: Sequence[str] = ()) -> Path:
    """Write the figures of several trainings into one file, with a column that names the stage; ``columns``: these only."""
    rows = []
    for stage, file in stages.items():
        with file.open() as opened:
            rows += [{"stage": stage, **row} for row in csv.DictReader(opened)]
    with path.open("w", newline="") as opened:
        names = ["stage", *(columns or dict.fromkeys(name for row in rows for name in row if name != "stage"))]
        writer = csv.DictWriter(opened, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def draw(path: Path) -> Path:
    """One panel per figure, in rows by stage."""
    panels = [(f"{stage}: {name}", points) for stage, figures in read(path).items() for name, points in figures.items()]
    fig, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3), squeeze=False, layout="constrained")
    for axis, (title, points) in zip(axes[0], panels, strict=True):
        axis.plot(*zip(*points, strict=True), lw=1.2)
        axis.set(title=title, xlabel="minutes", yscale="log" if "loss" in title else "linear")
        axis.grid(alpha=0.3, which="both")
    fig.savefig(path.with_suffix(".png"), dpi=90)
    return path.with_suffix(".png")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        draw(Path(name))
