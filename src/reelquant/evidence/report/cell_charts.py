"""Small drawings in the cells of a report's tables, as inline SVG; ``charts`` has the large ones."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from reelquant._numbers import figure, is_number
from reelquant.evidence.report.charts import Scale, padded, path, tag, text, tip

ROW = 15  # pixels of one interval
FAR = 6.0  # times the span of the others: a floor that makes the range longer than this is left out of it
Triple = tuple[float, float, float]


def plot_range(test: Triple, floors: Sequence[Triple], zero: float | None) -> tuple[float, float]:
    """The range of an interval plot, without floors so far away that the rest would shrink below a sixth."""
    kept = sorted(floors, key=lambda triple: abs(triple[0] - test[0]))
    while True:
        values = [*test, *(x for triple in kept for x in triple), *([zero] if zero is not None else [])]
        nearer = [*test, *(x for triple in kept[:-1] for x in triple), *([zero] if zero is not None else [])]
        if not kept or max(values) - min(values) <= FAR * (max(nearer) - min(nearer)) or max(nearer) == min(nearer):
            return padded(values)
        kept.pop()


def interval_plot(test: Triple, floors: Sequence[tuple[str, Triple]], zero: float | None = None) -> Markup:
    """Intervals below each other on one axis, the test first; widths are shares, so that the drawing fits any cell.

    Args:
        test: value, low end, high end.
        floors: the same of every floor, with its name.
        zero: a value to mark with a vertical line, where good values lie.
    """
    rows = [("test", "s-test", test), *((name, "s-floor", triple) for name, triple in floors)]
    low, high = plot_range(test, [triple for _, triple in floors], zero)
    scale = Scale(low, high, 3, 97)
    body = []
    if zero is not None:
        body.append(tag("line", css="median", x1=f"{scale(zero)}%", x2=f"{scale(zero)}%", y1=0, y2=ROW * len(rows)))
    for i, (name, style, triple) in enumerate(rows):
        body += _row(scale, name, style, triple, ROW * i + ROW / 2, radius=4 if i == 0 else 3)
    about = "; ".join(f"{name} {figure(value)}, {figure(low)} to {figure(high)}" for name, _, (value, low, high) in rows)
    return tag("svg", *body, css="interval", height=ROW * len(rows), role="img", aria_label=about)


def _row(scale: Scale, name: str, style: str, triple: Triple, y: float, radius: int) -> list[Markup]:
    """One interval with its value; an arrow at the edge if the value lies outside of the range."""
    value, low, high = triple
    if value < scale.low:
        return [text("0%", y + 4, "\u2039", css=f"beyond {style}")]
    if value > scale.high:
        return [text("100%", y + 4, "\u203a", css=f"beyond {style}")]
    words = tip(f"{name}: {figure(value)} ({figure(low)} to {figure(high)})")
    ends = {"x1": f"{max(3, scale(low))}%", "x2": f"{min(97, scale(high))}%", "y1": y, "y2": y}
    return [
        tag("line", words, css=f"whisker {style}", **ends),
        tag("circle", words, css=f"dot {style}", cx=f"{scale(value)}%", cy=y, r=radius),
    ]


def bar(share: float, style: str, about: str) -> Markup:
    """A horizontal bar over ``share`` of the cell."""
    width = f"{max(0.4, min(100.0, 100 * share)):.2f}%"
    return tag(
        "svg",
        tag("rect", tip(about), css=style, width=width, height=10, rx=2),
        css="bar",
        height=10,
        role="img",
        aria_label=about,
    )


def curve(series: Sequence[tuple[str, Sequence[float | None]]], frames: int, about: str) -> Markup | None:
    """Figures per frame with a cursor that the page moves; a list shorter than the clip holds changes between frames.

    Args:
        series: style and values per line.
        frames: of the clip.
        about: for screen readers.
    """
    values = [float(x) for _, line in series for x in line if x is not None and is_number(x)]
    if not values:
        return None
    low, high = padded(values)
    place = Scale(0, max(1, frames - 1), 0, 100)
    y = Scale(low, high, 40, 0)
    body = []
    for style, line in series:
        shift = (frames - len(line)) / 2
        points = [(place(i + shift), y(float(value))) for i, value in enumerate(line) if value is not None and is_number(value)]
        if points:
            body.append(tag("path", css=f"line {style}", d=path(points), vector_effect="non-scaling-stroke"))
    body.append(tag("line", css="cursor", x1=0, x2=0, y1=0, y2=40, vector_effect="non-scaling-stroke"))
    return tag(
        "svg",
        *body,
        css="curve",
        viewBox="0 0 100 40",
        preserveAspectRatio="none",
        role="img",
        aria_label=about,
    )
