"""The picture of what was tried: quality against speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reelquant.tuning.trials import Trial

COLORS = {True: "#1a7f37", False: "#cf222e"}


def draw(trials: Sequence[Trial], chosen: Trial | None, file: Path, against: str) -> None:
    """PSNR to what ``against`` names, the worst clip and motion against the expected speed, a dot a trial; green ones kept all limits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    best = _best(trials)
    above.plot([one.speedup for one in best], [one.figures["psnr"] for one in best], color="#999999", zorder=1, label="mean, best order")
    above.plot([one.speedup for one in best], [one.worst for one in best], color="#999999", linestyle=":", zorder=1, label="worst clip")
    for one in trials:
        color = COLORS[one.passed]
        above.scatter(one.speedup, one.figures["psnr"], color=color, marker="os"[one.order > 0], zorder=2)
        below.scatter(one.speedup, one.figures.get("motion_deviation", 0.0), color=color, marker="os"[one.order > 0])
    for one in best:
        above.annotate(
            f"{len(one.computed)} of {one.steps}", (one.speedup, one.figures["psnr"]), xytext=(4, 6), textcoords="offset points", fontsize=8
        )
    if chosen is not None:
        above.scatter(chosen.speedup, chosen.figures["psnr"], s=160, facecolors="none", edgecolors="black", zorder=3, label="chosen")
    above.set_ylabel(f"PSNR to {against}, dB")
    above.legend(loc="upper right")
    above.set_title(
        "steps at which blocks are computed; green keeps all limits; circles: the last result, squares: the last two", fontsize=9
    )
    above.margins(x=0.12, y=0.12)
    below.axhline(0.0, color="#cccccc", zorder=0)
    below.set_ylabel("motion deviation")
    below.set_xlabel("times faster, expected of a whole clip")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _best(trials: Sequence[Trial]) -> list[Trial]:
    """The trial with the highest PSNR of every number of computed steps, from many steps to few."""
    found: dict[int, Trial] = {}
    for one in trials:
        known = found.get(len(one.computed))
        if known is None or one.figures["psnr"] > known.figures["psnr"]:
            found[len(one.computed)] = one
    return [found[count] for count in sorted(found, reverse=True)]
