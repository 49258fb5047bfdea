"""Charts as inline SVG. Text stays text, colours come from the style sheet, hovering a mark shows its figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from reelquant._numbers import figure, is_number

WIDTH, HEIGHT = 380, 224
LEFT, RIGHT, TOP, BOTTOM = 60, 12, 12, 42  # pixels around the plotted area
LEAST_CELL, MOST_CELL = 5.0, 24.0  # pixels of a row of a map
LEAST_NAME = 56.0  # pixels of a column whose name fits beside its neighbours
LOG_FROM = 30.0  # spans of this factor get a logarithmic axis


@dataclass(frozen=True)
class Line:
    """One series: ``style`` is a class of the style sheet; ``low`` and ``high`` make a band around ``y``."""

    name: str
    style: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()

    @property
    def points(self) -> list[tuple[float, float]]:
        return [(float(x), float(y)) for x, y in zip(self.x, self.y, strict=False) if x is not None and y is not None and finite(x, y)]

    @property
    def band(self) -> list[tuple[float, float, float]]:
        rows = zip(self.x, self.low, self.high, strict=False)
        return [(float(x), float(a), float(b)) for x, a, b in rows if x is not None and a is not None and b is not None and finite(x, a, b)]


@dataclass(frozen=True)
class Dot:
    """One mark with the text that hovering shows."""

    x: float
    y: float
    style: str
    tip: str


@dataclass(frozen=True)
class Bubble:
    """One mark with an interval along y, a text inside it, a name for the legend and the text that hovering shows."""

    x: float
    y: float
    low: float
    high: float
    radius: float
    style: str
    mark: str
    name: str
    tip: str


@dataclass(frozen=True)
class Cell:
    """A rectangle of a map: its column and row, counted from 0, its shade from 0 (empty) to 1, the text that hovering shows, and whether
    it is framed."""

    column: int
    row: int
    shade: float
    tip: str
    framed: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing with its words; ``missing`` is the reason if it could not be drawn."""

    title: str
    about: str
    svg: Markup | None = None
    legend: Sequence[tuple[str, str]] = ()
    missing: str = ""


@dataclass(frozen=True)
class Scale:
    """Values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(max(x, 1e-30)) if self.log else x for x in (self.low, self.high, value))
        return round(self.start + (self.end - self.start) * (value - low) / ((high - low) or 1.0), 2)

    @property
    def ticks(self) -> list[float]:
        return decades(self.low, self.high) if self.log else steps(self.low, self.high)


@dataclass(frozen=True)
class Frame:
    """The plotted area with its two scales."""

    x: Scale
    y: Scale
    body: list[Markup] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------- parts


def finite(*values: float | None) -> bool:
    """True if all are finite numbers."""
    return all(is_number(value) for value in values)


def tag(name: str, *children: Markup | str, **attributes: object) -> Markup:
    """An element; underscores in attribute names become hyphens, ``css`` becomes ``class``, None is left out."""
    pairs = [("class" if key == "css" else key.replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    said = Markup("").join(Markup(' {}="{}"').format(Markup(key), str(value)) for key, value in pairs)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), said, Markup("").join(children))


def text(x: float | str, y: float, words: str, **attributes: object) -> Markup:
    return tag("text", escape(words), x=x, y=y, **attributes)


def tip(words: str) -> Markup:
    return tag("title", escape(words))


def steps(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values in a range: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten in a range, with 2 and 5 between them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(found) >= 3:
            return found[:: max(1, len(found) // 5)]
    return [low, high]


def padded(values: Iterable[float], log: bool = False, zero: bool = False) -> tuple[float, float]:
    """A range around values with some air; ``zero`` lets it start at 0 unless the values lie far from it."""
    found = list(values)
    low, high = min(found), max(found)
    if log:
        return low / 1.3, high * 1.3
    air = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    if zero and 0 <= low < 0.6 * high:
        return 0.0, high + air
    return low - air, high + air


def spans_decades(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > LOG_FROM


def path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x},{y}" for x, y in points)


def axes(frame: Frame, x_title: str, y_title: str, whole_x: bool = False) -> list[Markup]:
    """Grid lines, tick labels and titles; ``whole_x``: only whole numbers along x."""
    x, y = frame.x, frame.y
    marks = [tag("line", css="grid", x1=x.start, x2=x.end, y1=y(value), y2=y(value)) for value in y.ticks]
    marks += [text(x.start - 7, y(value) + 3.5, label(value), css="tick end") for value in y.ticks]
    shown = [value for value in x.ticks if not whole_x or value == int(value)]
    marks += [text(x(value), HEIGHT - BOTTOM + 16, label(value), css="tick middle") for value in shown]
    middle = (y.start + y.end) / 2
    marks.append(text((x.start + x.end) / 2, HEIGHT - 5, x_title, css="axis middle"))
    marks.append(text(11, middle, y_title, css="axis middle", transform=f"rotate(-90 11 {middle})"))
    return marks


def label(value: float) -> str:
    """A tick's text, as short as it can be."""
    if value and abs(value) < 1e-3:
        digits, power = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}".replace("-", "\u2212")
    return f"{value:,.6g}".replace("-", "\u2212")


def drawing(about: str, body: Iterable[Markup], height: float = HEIGHT, css: str = "chart") -> Markup:
    """An SVG that a screen reader reads as one sentence."""
    return tag("svg", *body, css=css, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=about)


def area(xs: Sequence[float], ys: Sequence[float], zero: bool = True, log_y: bool | None = None) -> Frame:
    """The plotted area for these values."""
    log = spans_decades(ys) if log_y is None else log_y
    low, high = min(xs), max(xs)
    wide = (low, high) if high > low else (low - 1, high + 1)
    return Frame(Scale(*wide, LEFT, WIDTH - RIGHT), Scale(*padded(ys, log, zero), HEIGHT - BOTTOM, TOP, log))


# --------------------------------------------------------------------------------------------------------------- charts


def line_chart(
    title: str,
    about: str,
    series: Sequence[Line],
    x_title: str,
    y_title: str,
    *,
    marks: bool = False,
    level: tuple[str, float] | None = None,
) -> Chart:
    """Lines with bands; ``level`` is a named horizontal line, ``marks`` puts a dot on every point."""
    series = [line for line in series if line.points]
    if not series:
        return Chart(title, about, missing="the data hold no points")
    values = [y for line in series for _, y in line.points] + [v for line in series for _, *both in line.band for v in both]
    frame = area([x for line in series for x, _ in line.points], values + ([level[1]] if level else []))
    body = axes(frame, x_title, y_title, whole_x=True)
    body += [_band(frame, line) for line in series if line.band]
    if level:
        y = frame.y(level[1])
        body.append(tag("line", css="level", x1=frame.x.start, x2=frame.x.end, y1=y, y2=y))
        body.append(text(frame.x.end, y - 5, f"{level[0]} {figure(level[1])}", css="tick end"))
    for line in series:
        body += _points(frame, line, x_title, marks)
    legend = [(line.style, line.name) for line in series] if len(series) > 1 else []
    return Chart(title, about, drawing(f"{title}. {about}", body), legend)


def _band(frame: Frame, line: Line) -> Markup:
    edge = [(x, high) for x, _, high in line.band] + [(x, low) for x, low, _ in reversed(line.band)]
    return tag("path", css=f"band {line.style}", d=path([(frame.x(x), frame.y(y)) for x, y in edge]) + "Z")


def _points(frame: Frame, line: Line, x_title: str, marks: bool) -> list[Markup]:
    places = [(frame.x(x), frame.y(y)) for x, y in line.points]
    css = f"dot {line.style}" if marks else "hit"
    drawn = [tag("path", css=f"line {line.style}", d=path(places))]
    for (x, y), (left, top) in zip(line.points, places, strict=True):
        words = f"{line.name}, {x_title} {label(x)}: {figure(y)}"
        drawn.append(tag("circle", tip(words), css=css, cx=left, cy=top, r=3.2))
    return drawn


def scatter_chart(
    title: str,
    about: str,
    dots: Sequence[Dot],
    x_title: str,
    y_title: str,
    legend: Sequence[tuple[str, str]] = (),
) -> Chart:
    """Dots; the y axis does not start at zero."""
    dots = [dot for dot in dots if finite(dot.x, dot.y)]
    if not dots:
        return Chart(title, about, missing="no layer has this figure")
    frame = area([dot.x for dot in dots], [dot.y for dot in dots], zero=True)
    body = axes(frame, x_title, y_title, whole_x=True)
    body += [tag("circle", tip(dot.tip), css=f"dot {dot.style}", cx=frame.x(dot.x), cy=frame.y(dot.y), r=3.2) for dot in dots]
    return Chart(title, about, drawing(f"{title}. {about}", body), legend)


def map_chart(title: str, about: str, cells: Sequence[Cell], x_title: str, y_title: str, named: Sequence[str] = ()) -> Chart:
    """Cells in columns and rows; the first row is on top, and many rows make the drawing higher.

    Rows are named by their numbers from 1, columns as ``named`` says, else by numbers as well.
    """
    if not cells:
        return Chart(title, about, missing="the data hold no cells")
    columns, rows = max(cell.column for cell in cells) + 1, max(cell.row for cell in cells) + 1
    high = min(max((HEIGHT - TOP - BOTTOM) / rows, LEAST_CELL), MOST_CELL)
    bottom = TOP + high * rows
    wide = (WIDTH - RIGHT - LEFT) / columns
    body = []
    size = {"width": round(wide, 2), "height": round(high, 2)}
    for one in sorted(cells, key=lambda cell: cell.framed):  # frames lie above their neighbours
        place = {"x": round(LEFT + wide * one.column, 2), "y": round(TOP + high * one.row, 2)}
        shade, css = round(min(max(one.shade, 0.0), 1.0), 3), "cell s-test framed" if one.framed else "cell s-test"
        body.append(tag("rect", tip(one.tip), css=css, fill_opacity=shade, **place, **size))
    body += [text(LEFT - 7, TOP + high * (one - 0.5) + 3.5, label(one), css="tick end") for one in _named(rows, int(12 / high) + 1)]
    ticks = dict(enumerate(named, 1)) if named else {one: label(one) for one in _named(columns, int(24 / wide) + 1)}
    lines = 2 if named and wide < LEAST_NAME else 1  # names that would touch each other stand in turns on two lines
    for one, words in ticks.items():
        body.append(text(LEFT + wide * (one - 0.5), bottom + 16 + 11 * (one % lines), words, css="tick middle"))
    middle = (TOP + bottom) / 2
    body.append(text((LEFT + WIDTH - RIGHT) / 2, bottom + BOTTOM - 5, x_title, css="axis middle"))
    body.append(text(22, middle, y_title, css="axis middle", transform=f"rotate(-90 22 {middle})"))
    return Chart(title, about, drawing(f"{title}. {about}", body, bottom + BOTTOM))


def _named(count: int, apart: int) -> list[int]:
    """Numbers from 1 to ``count`` that get a label, at least so far apart."""
    every = next(one for one in (1, 2, 5, 10, 20, 50, 100, 200, 500, count + apart) if one >= apart)
    return [1, *(one for one in range(every, count + 1, every) if one > apart)]


def bubble_chart(title: str, about: str, bubbles: Sequence[Bubble], x_title: str, y_title: str) -> Chart:
    """Bubbles of several sizes with intervals; the x axis starts at zero, the y axis where the intervals do."""
    bubbles = [one for one in bubbles if finite(one.x, one.y, one.low, one.high)]
    if not bubbles:
        return Chart(title, about, missing="no test has both figures")
    x = Scale(0.0, 1.12 * max(one.x for one in bubbles), LEFT, WIDTH - RIGHT)
    y = Scale(*padded([end for one in bubbles for end in (one.low, one.high)]), HEIGHT - BOTTOM, TOP)
    body = axes(Frame(x, y), x_title, y_title)
    for one in sorted(bubbles, key=lambda one: -one.radius):  # small ones on top
        left, top = x(one.x), y(one.y)
        body.append(tag("line", css=f"whisker {one.style}", x1=left, x2=left, y1=y(one.low), y2=y(one.high)))
        body.append(tag("circle", tip(one.tip), css=f"dot {one.style}", cx=left, cy=top, r=round(one.radius, 2)))
        body.append(text(left, top + 4, one.mark, css="inside middle"))
    legend = [(one.style, f"{one.mark} {one.name}") for one in bubbles]
    words = "; ".join(one.tip for one in bubbles)
    return Chart(title, about, drawing(f"{title}. {about} {words}", body), legend)


def swarm(values: Sequence[float], place: Callable[[float], float], radius: float) -> list[float]:
    """Heights at which dots of a strip do not cover each other, in units of a radius: 0, 2, -2, 4 ..."""
    order = (0, 2, -2, 4, -4, 6, -6, 8, -8, 10, -10)
    taken: dict[int, list[float]] = {}
    heights = [0.0] * len(values)
    for i in sorted(range(len(values)), key=lambda i: values[i]):
        x = place(values[i])
        free = [level for level in order if all(abs(x - other) >= 2 * radius for other in taken.get(level, ()))]
        level = free[0] if free else order[i % len(order)]
        taken.setdefault(level, []).append(x)
        heights[i] = level * radius
    return heights


def strip_chart(title: str, about: str, values: Sequence[tuple[float, str, str]], unit: str = "") -> Chart:
    """One dot per clip along an axis, the median as a line.

    Args:
        title, about: words.
        values: of every clip, with the text that hovering shows and the clip's name.
        unit: of the values.
    """
    values = [(value, words, name) for value, words, name in values if is_number(value)]
    if not values:
        return Chart(title, about, missing="no clip has this figure")
    height, middle, radius = 100, 36, 2.8
    numbers = [value for value, _, _ in values]
    scale = Scale(*padded(numbers), 16, WIDTH - 16)
    median = statistics.median(numbers)
    body = [tag("line", css="grid", x1=16, x2=WIDTH - 16, y1=height - 28, y2=height - 28)]
    body += [text(scale(value), height - 11, label(value), css="tick middle") for value in scale.ticks]
    body.append(
        tag(
            "line",
            tip(f"median {figure(median, unit)}"),
            css="median",
            x1=scale(median),
            x2=scale(median),
            y1=6,
            y2=height - 28,
        )
    )
    for (value, words, name), offset in zip(values, swarm(numbers, scale, radius), strict=True):
        place = {"cx": scale(value), "cy": middle + offset, "r": radius, "data_value": value}
        body.append(tag("circle", tip(words), css="dot s-test", data_clip=name, aria_label=words, **place))
    note = f"median {figure(median, unit)}, {figure(min(numbers))} to {figure(max(numbers))}"
    return Chart(title, note, drawing(f"{title} of {len(numbers)} clips: {note}. {about}", body, height))
