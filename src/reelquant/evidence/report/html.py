"""The page: data and clips to one HTML file that needs nothing but itself."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from reelquant.evidence.media import FPS
from reelquant.evidence.report import charts, markdown
from reelquant.evidence.report.charts import Chart, Dot, Line
from reelquant.evidence.report.markdown import Data, figure, is_number
from reelquant.evidence.report.panels import BADNESS, Embedded, Panel, best_gain, embed_within, worst_first
from reelquant.evidence.store import write_text

LIMIT_MB = 40.0
TOP_LAYERS = 20
FIGURES = 5  # per clip
STRIPS = 6
CURVES = ("psnr", "motion_energy")  # shown first


@dataclass(frozen=True)
class Tile:
    """A key figure of the header."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class MetricRow:
    """A row of the metric table; ``within`` is ``within``, ``outside`` or a dash."""

    title: str
    about: str
    arrow: str
    better: str
    reference: str
    value: str
    interval: str
    floors: Sequence[tuple[str, str, str]]
    plot: Markup
    plotted: Sequence[str]
    within: str


@dataclass(frozen=True)
class Curve:
    """A figure per frame, drawn."""

    title: str
    low: str
    high: str
    svg: Markup
    both: bool


@dataclass(frozen=True)
class ClipCard:
    """A clip with everything around it."""

    clip: Embedded
    badges: Sequence[str]
    figures: Sequence[tuple[str, str]]
    numbers: dict[str, float]
    curves: Sequence[Curve]


# --------------------------------------------------------------------------------------------------------------------- header


def tiles(data: Data) -> list[Tile]:
    """The first judged metric of every kind, then what was saved."""
    found: dict[str, Tile] = {}
    for name, metric in markdown.measured(data).items():
        kind = metric.get("kind") or "other"
        if kind not in found and metric.get("better") in markdown.BETTER:
            digits = markdown.decimals(metric)
            low, high = metric.get("low"), metric.get("high")
            note = f"{figure(low, '', digits)} to {figure(high, '', digits)}" if is_number(low) and is_number(high) else ""
            note += {True: ", within the float floor", False: ", outside of the float floor", None: ""}[metric.get("within_floor")]
            found[kind] = Tile(markdown.title(name, metric), figure(metric["value"], metric.get("unit") or "", digits), note.strip(", "))
    return [*found.values(), *savings(data.get("quantization") or {})]


def savings(quantization: Data) -> list[Tile]:
    """What quantization did, as key figures."""
    layers, kept = quantization.get("layers"), sum(len(names) for names in (quantization.get("kept") or {}).values())
    before, after = quantization.get("bytes_model_float"), quantization.get("bytes_model")
    found = []
    if is_number(before) and is_number(after) and after:
        found.append(Tile("Denoiser", f"{before / after:.2f}\u00d7", f"smaller, {markdown.size(before)} \u2192 {markdown.size(after)}"))
    if layers:
        found.append(Tile("Layers", f"{len(layers)} of {len(layers) + kept}", "quantized"))
    return found


# -------------------------------------------------------------------------------------------------------------------- metrics


def triple(metric: Data) -> tuple[float, float, float]:
    """Value and interval; without an interval three times the value."""
    value = float(metric["value"])
    low, high = metric.get("low"), metric.get("high")
    return value, float(low) if is_number(low) else value, float(high) if is_number(high) else value


def metric_row(name: str, metric: Data, floors: Sequence[str]) -> MetricRow:
    """A metric as text and drawing."""
    digits, unit = markdown.decimals(metric), metric.get("unit") or ""
    own = {floor: (metric.get("floor") or {}).get(floor) or {} for floor in floors}
    measured = [(floor, triple(found)) for floor, found in own.items() if is_number(found.get("value"))]
    arrow, better = markdown.BETTER.get(metric.get("better") or "", ("", ""))
    target = {"zero": 0.0, "one": 1.0}.get(metric.get("better") or "")
    return MetricRow(
        title=markdown.title(name, metric),
        about=metric.get("about") or "",
        arrow=arrow,
        better=better,
        reference=figure(metric.get("reference"), "", digits),
        value=figure(metric.get("value"), unit, digits),
        interval=range_text(metric, digits),
        floors=[(floor, figure(found.get("value"), "", digits), range_text(found, digits)) for floor, found in own.items()],
        plot=charts.interval_plot(triple(metric), measured, target),
        plotted=[floor for floor, _ in measured],
        within=markdown.WITHIN[metric.get("within_floor")],
    )


def range_text(metric: Data, digits: int | None) -> str:
    """``51.0 to 53.2`` or nothing."""
    low, high = metric.get("low"), metric.get("high")
    return f"{figure(low, '', digits)} to {figure(high, '', digits)}" if is_number(low) and is_number(high) else ""


def metric_groups(data: Data) -> list[tuple[str, list[MetricRow]]]:
    """Rows by kind, with the kind's title."""
    floors = markdown.floors_of(data)
    groups: dict[str, list[MetricRow]] = {}
    for name, metric in markdown.measured(data).items():
        groups.setdefault(markdown.KINDS.get(metric.get("kind") or "", "Other"), []).append(metric_row(name, metric, floors))
    return list(groups.items())


# ---------------------------------------------------------------------------------------------------------------------- clips


def clip_cards(data: Data, embedded: Sequence[Embedded], panels: Mapping[str, Panel]) -> list[ClipCard]:
    """A card per embedded clip."""
    metrics = markdown.metrics_of(data)
    per_clip = {str(entry.get("name")): entry for entry in data.get("per_clip") or []}
    return [clip_card(clip, panels[clip.name], per_clip.get(clip.name) or {}, data, metrics) for clip in embedded]


def clip_card(clip: Embedded, panel: Panel, entry: Data, data: Data, metrics: Mapping[str, Data]) -> ClipCard:
    """A clip with its figures, curves and what was noticed about it."""
    numbers = {name: float(value or 0.0) for name, value in panel.figures.items() if is_number(value)}
    ordered = [name for name in metrics if name in numbers] + [name for name in numbers if name not in metrics]
    shown = [(markdown.title(name, metrics.get(name)), figure(numbers[name], unit_of(metrics, name))) for name in ordered[:FIGURES]]
    badges = [defect.get("name") or "defect" for defect in data.get("defects") or [] if clip.name in (defect.get("clips") or [])]
    own, reference = entry.get("curves") or {}, entry.get("reference_curves") or {}
    names = sorted(own, key=lambda name: (CURVES.index(name) if name in CURVES else len(CURVES), name))[: len(CURVES)]
    curves = [clip_curve(name, own[name], reference.get(name), clip.frames, metrics) for name in names]
    return ClipCard(clip, badges, shown, numbers, [found for found in curves if found])


def clip_curve(
    name: str, own: Sequence[float | None] | None, reference: Sequence[float | None] | None, frames: int, metrics: Mapping[str, Data]
) -> Curve | None:
    """A figure per frame, with the reference's below it; None if there are no numbers."""
    series = [*([("s-ref", reference)] if reference else []), ("s-test", own or [])]
    words = markdown.title(name, metrics.get(name))
    numbers = [x for x in own or [] if x is not None and is_number(x)]
    svg = charts.curve(series, frames, f"{words} per frame, {figure(min(numbers, default=None))} to {figure(max(numbers, default=None))}")
    if svg is None:
        return None
    unit = unit_of(metrics, name)
    both = [float(x) for _, values in series for x in values if x is not None and is_number(x)]
    return Curve(words, figure(min(both), unit), figure(max(both), unit), svg, bool(reference))


def unit_of(metrics: Mapping[str, Data], name: str) -> str:
    return (metrics.get(name) or {}).get("unit") or ""


def clips_note(data: Data, given: int, shown: int, by: str | None, limit: float) -> str:
    """Which clips the page shows, and why not all."""
    total = max(int(data.get("clips") or 0), given)
    if not given:
        return "No clip is shown: none was handed to the report."
    which = (
        f"{markdown.count(shown, 'clip')} of {total}"
        if shown < total
        else f"All {markdown.count(total, 'clip')}"
        if total > 1
        else "The only clip"
    )
    order = f", worst {markdown.title(by, (data.get('metrics') or {}).get(by))} first" if by and total > 1 else ""
    why = f"; more would make this file larger than {limit:g} MB" if shown < given else ""
    left = "; the others were not handed to the report" if not why and given < total else ""
    return f"{which}{order}{why}{left}."


def orders(cards: Sequence[ClipCard], metrics: Mapping[str, Data]) -> list[tuple[str, str, str]]:
    """Name, title and direction of every metric that can sort the clips shown."""
    return [
        (name, markdown.title(name, metric), metric["better"])
        for name, metric in metrics.items()
        if metric.get("better") in BADNESS and len(cards) > 1 and all(name in card.numbers for card in cards)
    ]


# --------------------------------------------------------------------------------------------------------------------- charts


def trajectory_chart(data: Data) -> Chart:
    """How far the latents drift, step by step."""
    title, found = "Error along the denoising steps", data.get("trajectory")
    about = (found or {}).get("about") or "Relative error of the latents after each step."
    if not found:
        return Chart(title, about, missing="latents were not recorded for this report")
    test, numbers = found.get("test") or {}, found.get("steps") or []
    floors = (found.get("floor") or {}).items()
    series = [
        Line(f"floor: {name}", f"s-floor dash-{i % 3}", numbers, (floor or {}).get("mean") or []) for i, (name, floor) in enumerate(floors)
    ]
    series.append(Line(markdown.sides(data)[1], "s-test", numbers, *((test.get(key) or []) for key in ("mean", "low", "high"))))
    return charts.line_chart(title, sentence(about), series, "step", "error")


def grain_chart(data: Data) -> Chart:
    """Noise in flat areas against the number of steps."""
    title, about, found = "Grain against steps", "Noise left in flat areas of the clips, in levels of 255.", data.get("grain_growth")
    if not found:
        return Chart(title, about, missing="it was not measured at several numbers of steps")
    left, right = markdown.sides(data)
    series = [
        Line(left, "s-ref", found.get("steps") or [], found.get("reference") or []),
        Line(right, "s-test", found.get("steps") or [], found.get("test") or []),
    ]
    return charts.line_chart(title, about, series, "steps", "grain", marks=True)


def bias_chart(data: Data) -> Chart:
    """A distance of distributions against the number of clips."""
    found = data.get("bias") or {}
    name = markdown.title(found.get("metric") or "fvd", (data.get("metrics") or {}).get(found.get("metric")))
    title, about = f"{name} against sample size", "Few clips make the distance too large; the band is one standard deviation over draws."
    if not found:
        return Chart(title, about, missing="it was not measured on subsets of the clips")
    values, spread = found.get("values") or [], found.get("sd") or []
    low, high = ([v + sign * s for v, s in zip(values, spread, strict=False) if charts.finite(v, s)] for sign in (-1, 1))
    end = found.get("extrapolated")
    level = ("without bias:", float(end)) if end is not None and is_number(end) else None
    series = [Line(name, "s-test", found.get("sizes") or [], values, low, high)]
    return charts.line_chart(title, about, series, "clips", name, marks=True, level=level)


def strip_charts(data: Data) -> list[Chart]:
    """One strip per metric that clips have figures of."""
    entries = data.get("per_clip") or []
    found = []
    for name, metric in markdown.metrics_of(data).items():
        values = [(entry, (entry.get("figures") or {}).get(name)) for entry in entries]
        unit = metric.get("unit") or ""
        dots = [
            (float(v), f"{entry.get('name')}: {figure(v, unit)} \u2013 {entry.get('prompt') or 'no prompt'}")
            for entry, v in values
            if is_number(v)
        ]
        if dots and metric.get("better") in markdown.BETTER:
            found.append(charts.strip_chart(markdown.title(name, metric), metric.get("about") or "", dots, unit))
    return found[:STRIPS]


def layer_charts(quantization: Data) -> list[Chart]:
    """Figures of the layers in the order of the network, coloured by role."""
    wanted = (
        ("coverage", "Code coverage", "Share of the input's codes that a channel uses, mean over channels.", "share"),
        ("tdscore", "TDScore of temporal layers", "How well quantized timestep features keep their distances; 1 is lossless.", "TDScore"),
        (
            "skewness",
            "Skewness of temporal features",
            "Asymmetry of the timestep features that a grid has to cover; 0 is even.",
            "skewness",
        ),
    )
    layers = quantization.get("layers") or []
    found = []
    for key, title, about, axis in wanted:
        rows = [(i, layer) for i, layer in enumerate(layers, 1) if is_number(layer.get(key))]
        dots = [Dot(i, x[key], role_style(x), f"{x.get('name')} ({x.get('role')}): {figure(x[key])}") for i, x in rows]
        chart = charts.scatter_chart(title, about, dots, "layer, in order", axis, roles_of([layer for _, layer in rows]))
        found.append(chart if layers else Chart(title, about, missing="there is no quantization report"))
    return found


ROLES = ("main", "temporal", "prompt", "constant", "entry", "exit")


def role_style(layer: Data) -> str:
    """The class of a role's colour."""
    return f"r-{layer['role']}" if layer.get("role") in ROLES else "r-other"


def roles_of(layers: Sequence[Data]) -> list[tuple[str, str]]:
    """Legend of the roles in use."""
    return list({role_style(layer): str(layer.get("role")) for layer in layers}.items())


def error_bars(quantization: Data) -> list[tuple[str, str, str, Markup]]:
    """Name, role, error and bar of every layer, the largest error first."""
    layers = [layer for layer in quantization.get("layers") or [] if is_number(layer.get("error"))]
    layers.sort(key=lambda layer: -layer["error"])
    top = layers[0]["error"] if layers else 0.0
    return [
        (
            x["name"],
            x.get("role") or "",
            figure(x["error"]),
            charts.bar(x["error"] / (top or 1), role_style(x), f"{x['name']} {figure(x['error'])}"),
        )
        for x in layers
    ]


def sentence(words: str) -> str:
    """First letter large, a full stop at the end."""
    return words[:1].upper() + words[1:].rstrip(".") + "."


# ---------------------------------------------------------------------------------------------------------------------- proof


LAYER_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("name", "Layer", "text"),
    ("role", "Role", "text"),
    ("weight", "Weight", "text"),
    ("input", "Input", "text"),
    ("solver", "Solver", "text"),
    ("bytes_after", "Bytes", "size"),
    ("error", "Error", "number"),
    ("coverage", "Coverage", "number"),
    ("tdscore", "TDScore", "number"),
    ("skewness", "Skewness", "number"),
)
SHOW = {"text": lambda value: str(value) if value not in (None, "") else markdown.NOTHING, "size": markdown.size, "number": figure}


def layer_rows(quantization: Data) -> list[list[tuple[str, Any]]]:
    """Cells as shown and as sorted; what is missing sorts last."""
    return [
        [(SHOW[kind](layer.get(key)), layer.get(key) if layer.get(key) is not None else "") for key, _, kind in LAYER_COLUMNS]
        for layer in quantization.get("layers") or []
    ]


def facts(quantization: Data) -> list[tuple[str, str]]:
    """The proof as pairs of name and text."""
    get = quantization.get
    rows = [
        ("Recipe", " ".join(filter(None, [get("recipe"), f"({get('digest')})" if get("digest") else ""]))),
        ("Denoiser", " ".join(filter(None, [get("denoiser"), f"({get('component')})" if get("component") else ""]))),
        ("Kernels", ", ".join(f"{name}: {markdown.count(layers, 'layer')}" for name, layers in (get("kernel") or {}).items())),
        ("Arithmetic", {True: "simulated: products are computed in float", False: "real low-bit", None: ""}[get("simulated")]),
        (
            "Calibration clips",
            f"{figure(get('latent_psnr'), 'dB')} PSNR of the final latents to float" if is_number(get("latent_psnr")) else "",
        ),
        ("Temporal tables", markdown.size(get("bytes_tables")) if get("bytes_tables") else ""),
        ("Calibration", ", ".join(filter(None, [calibration(quantization), f"seed {get('seed')}" if get("seed") is not None else ""]))),
        ("Search", markdown.count(len(get("trials") or []), "trial") if get("trials") else ""),
    ]
    return [(name, words) for name, words in rows if words]


def calibration(quantization: Data) -> str:
    """How much was sampled for calibration."""
    prompts, steps = quantization.get("prompts") or [], quantization.get("timesteps") or []
    return ", ".join(markdown.count(len(items), word) for items, word in ((prompts, "prompt"), (steps, "step")) if items)


def byte_bars(quantization: Data) -> list[tuple[str, str, str, Markup, Markup, str]]:
    """Quantized layers and whole denoiser: name, before, after, both bars, ratio."""
    found = []
    for title, before_key, after_key in (
        ("Quantized layers", "bytes_float", "bytes_quantized"),
        ("Whole denoiser", "bytes_model_float", "bytes_model"),
    ):
        before, after = quantization.get(before_key), quantization.get(after_key)
        if is_number(before) and is_number(after) and before and after:
            top = max(quantization.get("bytes_model_float") or 0, before)
            texts = markdown.size(before), markdown.size(after)
            bars = charts.bar(before / top, "s-ref", texts[0]), charts.bar(after / top, "s-test", texts[1])
            found.append((title, *texts, *bars, f"{before / after:.2f}\u00d7 smaller"))
    return found


def trial_rows(quantization: Data) -> list[tuple[str, str, str]]:
    """Family, options and score of every trial, the best of a family first."""
    trials = quantization.get("trials") or []
    ordered = sorted(trials, key=lambda trial: (str(trial.get("family")), -(trial.get("psnr") or 0.0)))
    return [(str(t.get("family")), plain(t.get("options")) or "none", figure(t.get("psnr"), "dB")) for t in ordered]


def plain(value: Any) -> str:
    """Nested data on one line, without quotes and outer brackets."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key}: {plain(item)}" if not isinstance(item, Mapping) else f"{key} ({plain(item)})" for key, item in value.items()
        )
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def environment(data: Data) -> list[tuple[str, str]]:
    """What the run was made with, as pairs of name and text."""
    machine, test = data.get("machine") or {}, data.get("test") or {}
    seeds = [seed for seed in data.get("seeds") or [] if isinstance(seed, int)]
    rows = [
        ("Reference", " ".join(filter(None, ((data.get("reference") or {}).get(key) for key in ("name", "dtype"))))),
        ("Test", ", ".join(filter(None, (test.get("name"), f"recipe {test['recipe']}" if test.get("recipe") else "")))),
        ("Sampler call", plain(data.get("call") or {})),
        ("Seeds", markdown.ranges(seeds)),
        ("Machine", ", ".join(f"{name.replace('_', ' ')} {plain(item)}" for name, item in machine.items() if item is not None)),
        ("Versions", plain({"reelquant": data.get("tool_version") or "unknown"} | dict(data.get("versions") or {})).replace(":", "")),
        ("Seconds", ", ".join(f"{name} {figure(took)}" for name, took in (data.get("seconds") or {}).items())),
        ("Peak memory", figure(data.get("peak_memory_gb"), "GB") if is_number(data.get("peak_memory_gb")) else ""),
    ]
    return [(name, words or "not recorded") for name, words in rows]


# ----------------------------------------------------------------------------------------------------------------------- page


@functools.cache
def resource(name: str) -> str:
    """A text file that lies beside this module."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def policy(script: str, style: str) -> str:
    """The content security policy: nothing from anywhere, and only this script and this style sheet."""
    hashes = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in (script, style)]
    return (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; "
        "media-src blob:; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def finite_only(value: Any) -> Any:
    """The data with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): finite_only(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_only(item) for item in value]
    return None if isinstance(value, float) and not is_number(value) else value


def render(data: Data, clips: Sequence[Panel] = (), *, limit_mb: float = LIMIT_MB, fps: float | None = None) -> str:
    """The report as one HTML page.

    Args:
        data: the content of ``report.json``; ``docs/report.md`` has the schema. Every field may be absent or null.
        clips: to play side by side; the worst come first.
        limit_mb: bound of the page's size, in 10^6 characters; the best clips are left out to keep it.
        fps: frames per second of the clips; None: what the data say, or 8.

    Raises:
        ValueError: if two clips have one name.
    """
    panels = {panel.name: panel for panel in clips}
    if len(panels) != len(clips):
        raise ValueError("clips of a report need different names")
    data = finite_only(data)
    fps = fps or data.get("fps") or FPS
    metrics = markdown.metrics_of(data)
    ordered, by = worst_first(clips, metrics)
    gain = best_gain(ordered)
    spare = 150_000 + 6 * len(json.dumps(data))  # more than the page takes without its clips
    embedded = embed_within(ordered, gain, fps, max(0.0, limit_mb * 1e6 - spare))
    cards = clip_cards(data, embedded, panels)
    quantization = data.get("quantization") or {}
    tone, sentences = markdown.verdict(data)
    script, style = resource("report.js"), resource("report.css")
    page = environment_of_templates().from_string(resource("template.html.jinja"))
    return page.render(
        data=data,
        policy=policy(script, style),
        script=Markup(script),
        style=Markup(style),
        kind=markdown.TITLES.get(data.get("kind") or "", "Report"),
        headline=markdown.headline(data),
        tone=tone,
        sentences=sentences,
        tiles=tiles(data),
        sides=markdown.sides(data),
        failures=[
            (failure, markdown.title(failure.get("metric") or "unknown", metrics.get(failure.get("metric") or "")))
            for failure in (data.get("gate") or {}).get("failures") or []
        ],
        cards=cards,
        clips_note=clips_note(data, len(clips), len(cards), by, limit_mb),
        orders=orders(cards, metrics),
        frames=max((card.clip.frames for card in cards), default=1),
        gain=gain,
        fps=fps,
        groups=metric_groups(data),
        floors=markdown.floors_of(data),
        has_reference=any(is_number(metric.get("reference")) for metric in metrics.values()),
        missing=[(*markdown.command(reason), titles) for reason, titles in markdown.missing(data).items()],
        charts=[trajectory_chart(data), bias_chart(data), grain_chart(data)],
        strips=strip_charts(data),
        errors=error_bars(quantization),
        top=TOP_LAYERS,
        roles=roles_of(quantization.get("layers") or []),
        layer_charts=layer_charts(quantization),
        facts=facts(quantization),
        byte_bars=byte_bars(quantization),
        columns=LAYER_COLUMNS,
        layers=layer_rows(quantization),
        trials=trial_rows(quantization),
        environment=environment(data),
        command=markdown.reproduce(data),
    )


def environment_of_templates() -> Environment:
    """Everything is escaped unless it was made here."""
    found = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters["count"] = markdown.count
    return found


def write(data: Data, clips: Sequence[Panel], path: str | Path, *, limit_mb: float = LIMIT_MB, fps: float | None = None) -> Path:
    """Write the page; it appears complete or not at all. Folders on the way are made.

    Args:
        data, clips, limit_mb, fps: see :func:`render`.
        path: of the HTML file.

    Returns:
        The path.

    Raises:
        CheckpointError: if the file cannot be written.
    """
    path = Path(path)
    write_text(path, render(data, clips, limit_mb=limit_mb, fps=fps))
    return path
