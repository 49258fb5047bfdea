"""Rows to CSV, Markdown and a chart; every table of the speed benchmarks has the same look."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import markdown, write_csv
from benchmarks.speed.machine import FLOAT

Row = dict[str, Any]
OURS, TORCH, PEER, LIMIT = "#c2410c", "#64748b", "#93c5fd", "#166534"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # keeps numbers readable where lines cross them


def reason(error: BaseException) -> str:
    """An exception on one line."""
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:160]


def failed(row: Row, error: BaseException) -> Row:
    """The row of a variant that does not run."""
    return row | {"status": "failed", "reason": reason(error)}


def flat(row: Row) -> Row:
    """A row without lists and tables, for CSV."""
    return {key: value for key, value in row.items() if not isinstance(value, list | dict | tuple)}


def write(folder: Path, name: str, title: str, headings: Sequence[str], rows: Sequence[Row], lines: Sequence[Sequence[str]]) -> str:
    """``NAME.csv`` and ``NAME.md``; the Markdown is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / f"{name}.csv", map(flat, rows))
    text = f"{title}\n\n{markdown(headings, [[cell.replace('|', '/') for cell in line] for line in lines])}"
    (folder / f"{name}.md").write_text(text)
    return text


def bars(file: Path, title: str, rows: Sequence[Row], limit: float | None = None, what: str = f"times as fast as eager {FLOAT}") -> None:
    """Horizontal bars of ``ratio`` by ``name``, fastest first, whiskers from ``ratio_low`` to ``ratio_high``.

    Args:
        file: PNG or SVG.
        title: of the chart.
        rows: those with a ratio are drawn.
        limit: a ratio that this machine cannot exceed, drawn as a line.
        what: label of the axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = sorted((row for row in rows if row.get("ratio")), key=lambda row: row["ratio"])
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.32 * len(drawn)), layout="constrained")
    values = [row["ratio"] for row in drawn]
    spread = [[row["ratio"] - row["ratio_low"] for row in drawn], [row["ratio_high"] - row["ratio"] for row in drawn]]
    axes.barh(
        [row["name"] for row in drawn], values, xerr=spread, color=[_color(row) for row in drawn], error_kw={"lw": 1, "ecolor": "#334155"}
    )
    top = max([*(row["ratio_high"] for row in drawn), limit or 0])
    for index, row in enumerate(drawn):
        axes.text(row["ratio_high"] + 0.01 * top, index, f"{row['ratio']:.2f}", va="center", fontsize=8, bbox=PAPER)
    axes.axvline(1, color="#334155", lw=1)
    if limit:
        axes.axvline(limit, color=LIMIT, lw=1.5, ls="--")
        axes.text(limit, len(drawn) - 0.35, f"all products at peak {limit:.2f} ", color=LIMIT, fontsize=8, va="bottom", ha="right")
    axes.set(xlabel=what, xlim=(0, 1.12 * top))
    axes.set_title(title, fontsize=10, pad=14, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _color(row: Row) -> str:
    return OURS if row["name"].startswith("ours") else TORCH if re.match(r"(bf16|fp32)", row["name"]) else PEER
