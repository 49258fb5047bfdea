"""What was done to the layers, and how to run it again: tables of the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from reelquant._numbers import NOTHING, count, figure, percent, plain, ranges, size
from reelquant.evidence.report import cell_charts
from reelquant.evidence.report.data import ClippedLayerData, LayerData, QuantizationData, ReportData, SaturationData, SpeedData, SpreadData
from reelquant.evidence.report.glossary import KERNELS

LAYER_COLUMNS: tuple[tuple[str, str, str], ...] = (  # field, title, kind
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
SHOW: dict[str, Callable[[Any], str]] = {"text": lambda value: value or NOTHING, "size": size, "number": figure}
ARITHMETIC = {
    True: "simulated: layers are stored in few bits, and float arithmetic stands in for their few-bit products",
    False: "as the recipe says, nothing is simulated",
    None: "",
}


def layer_rows(quantization: QuantizationData) -> list[list[tuple[str, Any]]]:
    """Cells as shown and as sorted; what is missing sorts last."""
    return [[_cell(layer, field, kind) for field, _, kind in LAYER_COLUMNS] for layer in quantization.layers]


def _cell(layer: LayerData, field: str, kind: str) -> tuple[str, Any]:
    value = getattr(layer, field)
    return SHOW[kind](value), "" if value is None else value


def clipped_rows(found: SaturationData) -> list[tuple[str, str, str, str, Markup]]:
    """Layer, share of clipped values, farthest value, clipping over rounding and its bar; layers that clip nothing are left out."""
    layers = [one for one in found.layers if one.share]
    most = max((one.excess or 0.0 for one in layers), default=0.0) or 1.0
    return [_clipped_row(one, (one.excess or 0.0) / most) for one in layers]


def _clipped_row(one: ClippedLayerData, part: float) -> tuple[str, str, str, str, Markup]:
    name, excess = one.name or "unnamed", figure(one.excess)
    return name, percent(one.share), figure(one.reach), excess, cell_charts.bar(part, "s-test", f"{name} {excess}")


def facts(quantization: QuantizationData) -> list[tuple[str, str]]:
    """The proof as pairs of name and text."""
    q = quantization
    psnr = "" if q.latent_psnr is None else f"{figure(q.latent_psnr, 'dB')} PSNR of the final latents to float"
    rows = [
        ("Recipe", _named(q.recipe, q.digest)),
        ("Denoiser", _named(q.denoiser, q.component)),
        ("Computed by", "; ".join(_kernel(name, layers) for name, layers in q.kernel.items())),
        ("Arithmetic", ARITHMETIC[q.simulated]),
        ("Calibration clips", psnr),
        ("Temporal tables", size(q.bytes_tables) if q.bytes_tables else ""),
        ("Calibration", calibration(q)),
        ("Search", count(len(q.trials), "trial") if q.trials else ""),
    ]
    return [(name, words) for name, words in rows if words]


def _kernel(name: str, layers: int) -> str:
    words = f" ({KERNELS[name]})" if name in KERNELS else ""
    return f"{name}{words}: {count(layers, 'layer')}"


def _named(name: str | None, detail: str | None) -> str:
    return " ".join(filter(None, [name, f"({detail})" if detail else ""]))


def calibration(quantization: QuantizationData) -> str:
    """How much was sampled for calibration, and the seed."""
    clips = "prompt" if any(quantization.prompts) else "clip"  # texts are empty where the pipeline takes none
    amounts = ((quantization.prompts, clips), (quantization.timesteps, "step"))
    parts = [count(len(items), word) for items, word in amounts if items]
    return ", ".join([*parts, *([] if quantization.seed is None else [f"seed {quantization.seed}"])])


def byte_bars(quantization: QuantizationData) -> list[tuple[str, str, str, Markup, Markup, str]]:
    """Quantized layers and whole denoiser: name, before, after, both bars, ratio."""
    q = quantization
    rows = (
        ("Quantized layers", q.bytes_float, q.bytes_quantized),
        ("Whole denoiser", q.bytes_model_float, q.bytes_model),
    )
    found = []
    for title, before, after in rows:
        if before and after:
            top = max(q.bytes_model_float or 0, before)
            texts = size(before), size(after)
            bars = cell_charts.bar(before / top, "s-ref", texts[0]), cell_charts.bar(after / top, "s-test", texts[1])
            found.append((title, *texts, *bars, f"{before / after:.2f}\u00d7 smaller"))
    return found


def trial_rows(quantization: QuantizationData) -> list[tuple[str, str, str]]:
    """Family, options and score of every trial, the best of a family first."""
    ordered = sorted(quantization.trials, key=lambda trial: (str(trial.family), -(trial.psnr or 0.0)))
    return [(trial.family or "unnamed", plain(trial.options) or "none", figure(trial.psnr, "dB")) for trial in ordered]


def cost_rows(data: ReportData) -> list[tuple[str, str, str, str]]:
    """Name, float, quantized and their ratio: bytes, and times and memory if they were measured."""
    q, speed = data.quantization or QuantizationData(), data.speed or SpeedData()
    rows = [
        _bytes_row("All weights of the folder", data.bytes.reference, data.bytes.test),
        _bytes_row("Denoiser, as float32 beside", q.bytes_model_float, q.bytes_model),
        _bytes_row("Its quantized layers, as float32 beside", q.bytes_float, q.bytes_quantized),
        _time_row("Whole clip", speed.seconds, speed.speedup),
        _time_row("One step", speed.step_seconds, speed.step_speedup),
        _bytes_row("Peak memory", speed.peak_bytes.get("reference"), speed.peak_bytes.get("test")),
    ]
    return [row for row in rows if row is not None]


def _bytes_row(title: str, before: float | None, after: float | None) -> tuple[str, str, str, str] | None:
    if not before or not after:
        return None
    ratio = f"{before / after:.2f}\u00d7 smaller" if after <= before else f"{after / before:.2f}\u00d7 larger"
    return title, size(before), size(after), ratio


def _time_row(title: str, seconds: Mapping[str, SpreadData], ratio: SpreadData) -> tuple[str, str, str, str] | None:
    if ratio.median is None:
        return None
    both = (figure(seconds.get(side, SpreadData()).median, "s") for side in ("reference", "test"))
    return title, *both, f"{ratio.median:.2f}\u00d7 as fast ({figure(ratio.low)} to {figure(ratio.high)})"


def cost_note(data: ReportData) -> str:
    """How times were measured, or how they can be."""
    if data.speed is None:
        return "Speed and peak memory were not measured; reelquant evaluate --speed does, in turns with float."
    how = data.speed.data
    rounds, threads, device = (how.get(name) for name in ("rounds", "threads", "device"))
    number = (how.get("reference") or {}).get("short")
    failed = how.get("peak_memory_failed")
    memory = f" Peak memory is missing: {failed}." if failed else " Peak memory is that of a process for each."
    return (
        f"Both made the same clip in turns, {rounds} rounds, in {number} on {device} with {count(threads or 1, 'thread')}. "
        f"A ratio is of two times of one round; medians, and quartiles in brackets.{memory}"
    )


def environment(data: ReportData) -> list[tuple[str, str]]:
    """What the run was made with, as pairs of name and text."""
    recipe = f"recipe {data.test.recipe}" if data.test.recipe else ""
    machine = {name.replace("_", " "): item for name, item in data.machine.items() if item is not None}
    versions = {"reelquant": data.tool_version or "unknown"} | data.versions
    rows = [
        ("Reference", " ".join(filter(None, (data.reference.name, data.reference.dtype)))),
        ("Test", ", ".join(filter(None, (data.test.name, recipe)))),
        ("Sampler call", plain(data.call)),
        ("Seeds", ranges(seed for seed in data.seeds if isinstance(seed, int))),
        ("Machine", ", ".join(f"{name} {plain(item)}" for name, item in machine.items())),
        ("Versions", plain(versions).replace(":", "")),
        ("Seconds", ", ".join(f"{name} {figure(took)}" for name, took in data.seconds.items()) + _expected(data)),
        ("Peak memory", "" if data.peak_memory_gb is None else figure(data.peak_memory_gb, "GB")),
    ]
    return [(name, words or "not recorded") for name, words in rows]


def _expected(data: ReportData) -> str:
    return "" if data.expected_seconds is None else f" (expected in all: {figure(data.expected_seconds)})"
