"""Tables of plans, reports and recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from reelquant._errors import printable
from reelquant._numbers import duration
from reelquant.cli.console import figure, marked, size
from reelquant.cli.layout import facts, table

if TYPE_CHECKING:
    from reelquant.engine.plan import LayerPlan, Plan
    from reelquant.engine.quality import LayerRecord
    from reelquant.engine.report import Report
    from reelquant.evidence.evaluation import Evaluation, Result
    from reelquant.evidence.several import Evaluations
    from reelquant.nn import AttentionFacts
    from reelquant.recipes.entry import Entry
    from reelquant.streaming import Job
    from reelquant.streaming.estimate import Estimate

WORST = 8
NAMES = 3  # examples of layers per reason


def plan_table(plan: Plan) -> Table:
    """A row per layer: what it becomes, or why it stays."""
    made = table(
        f"Plan of {plan.recipe.name} for {plan.map.cls}", ["layer", "role", "becomes"], ["before", "after", "smaller"], hides=["smaller"]
    )
    for row in plan.layers.values():
        made.add_row(row.layer.name, row.layer.role, _becomes(row), *_sizes(row.bytes_before, row.bytes_after))
    made.add_section()
    made.add_row(
        marked("[bold]quantized layers"),
        "",
        f"{len(plan.quantized)} of {len(plan.layers)}",
        *_sizes(*plan_bytes(plan.quantized)),
    )
    made.add_row(marked("[bold]all layers"), "", "", *_sizes(*plan_bytes(list(plan.layers.values()))))
    return made


def stages_table(plan: Plan, device: str = "cpu") -> Table:
    """A row per stage, in order: what it does, how many layers it touches, and what is known of it on a device."""
    made = table("What its stages do, in order", ["stage"], ["layers"])
    for entry in plan.entries:
        outlook = entry.stage.outlook(device.partition(":")[0])
        said = f"{stage_words(entry)}{f' ({outlook})' if outlook else ''}"
        made.add_row(said, str(len(plan.touched(entry))) if entry.stage.takes_on else "all")
    return made


def stage_words(entry: Entry) -> str:
    """What one stage does, with its parameters, and to which layers."""
    from reelquant.recipes.axes import AXES

    values = {key: list(dict.fromkeys(str(one[key]) for one in entry.options)) for key in entry.options[0]}
    extra = ", ".join(f"{key} {_choice(tried)}" for key, tried in values.items())
    parameters = f" ({extra})" if extra else ""
    where = "" if entry.on == "*" else f", on {entry.on}"
    about = (entry.stage.__doc__ or "").strip().splitlines()[0]
    return f"{AXES[entry.axis].verb} {entry.name}{parameters}{where}. {about}"


def _choice(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"one of {', '.join(values)} by whole trajectories"


def _stage_json(plan: Plan, entry: Entry, device: str) -> dict[str, Any]:
    return {
        "axis": entry.axis,
        "name": entry.name,
        "options": [dict(one) for one in entry.options],
        "layers": len(plan.touched(entry)),
        "outlook": entry.stage.outlook(device.partition(":")[0]),
    }


def estimate_json(job: Job, expected: Estimate) -> dict[str, Any]:
    """Memory, disk and time that the work takes, in bytes and seconds."""
    return asdict(expected) | {
        "budget": job.budget,
        "seconds": job.seconds(expected),
        "streams": expected.in_memory > job.budget,
    }


def estimate_table(job: Job, expected: Estimate) -> Table:
    """Memory, disk and time that the work takes, before it starts."""
    streams = expected.in_memory > job.budget
    calls = f"; {expected.calls} calls of the denoiser and solvers come on top" if expected.calls else ""
    made = table("What it takes" + (": from disk to disk" if streams else ": in memory"), ["", "about", "for"])
    made.add_row(
        "memory",
        size(expected.memory if streams else expected.in_memory),
        expected.largest if streams else "the whole model",
    )
    made.add_row("allowed", size(job.budget), "" if streams else "the whole model fits")
    made.add_row("free disk", size(expected.disk if streams else expected.result), "until the work is done")
    made.add_row("result", size(expected.result), f"the float folder has {size(expected.source)}")
    made.add_row("time", duration(job.seconds(expected)), f"reading, rounding, writing{calls}")
    for name, count in expected.stages.items():
        made.add_row("", f"{count} calls", f"of these for {name}, at most")
    if streams and expected.calls:
        on_top = "activations of a denoiser call come on top of the memory, its remembered outputs of the disk, its computation of the time"
        made.add_row("", "", on_top)
    return made


def plan_bytes(rows: Sequence[LayerPlan]) -> tuple[int, int]:
    """Bytes before and after."""
    return sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)


def _becomes(row: LayerPlan) -> str | Text:
    if row.skipped is not None:
        return Text(f"float: {printable(row.skipped)}", style="dim")
    return numbers(str(row.weight), "float" if row.input is None else str(row.input))


def numbers(weight: str, input: str) -> str:
    """Formats of a layer: ``int8 channel, input int8 tensor``."""
    return f"{weight}, input {input}"


def _sizes(before: int, after: int) -> tuple[str, str, str]:
    return size(before), size(after), f"{before / max(after, 1):.2f}x"


def _layer_json(row: LayerPlan) -> dict[str, Any]:
    return {
        "name": row.layer.name,
        "role": row.layer.role,
        "skipped": row.skipped,
        "weight": row.weight and str(row.weight),
        "input": row.input and str(row.input),
        "bytes_before": row.bytes_before,
        "bytes_after": row.bytes_after,
    }


def plan_json(plan: Plan, device: str = "cpu") -> dict[str, Any]:
    """The plan as plain data."""
    before, after = plan_bytes(plan.quantized)
    layers = [_layer_json(row) for row in plan.layers.values()]
    totals = {"quantized": len(plan.quantized), "skipped": len(plan.skipped), "bytes_before": before, "bytes_after": after}
    stages = [_stage_json(plan, entry, device) for entry in plan.entries]
    return {"recipe": plan.recipe.name, "denoiser": plan.map.cls, **totals, "stages": stages, "layers": layers}


# ------------------------------------------------------------------------------------------------------------------------ proof


def proof(report: Report) -> list[Table]:
    """What was done and how well: sizes of every component and of all, worst layers, skipped layers, warnings."""
    parts = [
        *(summary(part) for part in report.parts.values()),
        summary(report),
        *([worst(report)] if any(x.error is not None for x in report.layers) else []),
        skipped(report),
    ]
    return parts + ([facts("Warnings", [("!", text) for text in report.warnings])] if report.warnings else [])


def summary(report: Report) -> Table:
    """The figures of the whole model."""
    count = sum(len(names) for names in report.skipped.values())
    kernels = computed_by(report.kernel, report.simulated)
    smaller = f"[bold]{report.ratio:.2f}x smaller[/bold] than float32, scales and biases included"
    bytes_ = marked(f"{size(report.bytes_float)} -> {size(report.bytes_quantized)}, {smaller}")
    psnr = "not sampled: the recipe needs no data"
    if report.latent_psnr is not None:
        lowest = "" if report.latent_psnr_worst is None else f", {report.latent_psnr_worst:.1f} dB the worst clip"
        psnr = f"{report.latent_psnr:.1f} dB PSNR of the final latents to float{lowest}"
    tdscore = report.mean("tdscore", "temporal")
    rows: list[tuple[str, str | Text]] = [
        *_folder(report),
        ("layers", f"{len(report.layers)} quantized, {count} skipped (they stay float)"),
        ("their bytes", bytes_),
        *([("temporal tables", f"{size(report.bytes_tables)} on top")] if report.bytes_tables else []),
        ("with float layers", f"{size(report.bytes_model_float)} -> {size(report.bytes_model)}"),
        ("kernels", kernels),
        *attended_by(report.attention),
        *([] if report.figures and report.latent_psnr is None else [("held-out clips", psnr)]),
        *clipped(report.saturation),
        *([("temporal layers", f"TDScore {figure(tdscore)} (1 is lossless)")] if tdscore is not None else []),
        *((name.replace("_", " "), _figure(name, value)) for name, value in report.figures.items()),
        ("time", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())),
    ]
    return facts(f"{report.recipe} on {report.denoiser} ({report.component})", rows)


def _folder(report: Report) -> list[tuple[str, str | Text]]:
    """What the whole folder became, if it was saved and came from one."""
    if not report.bytes_source or not report.bytes_folder:
        return []
    ratio = report.bytes_source / report.bytes_folder
    words = f"[bold]{ratio:.2f}x smaller[/bold]" if ratio >= 1 else f"[bold]{1 / ratio:.2f}x larger[/bold]"
    return [("folder", marked(f"{size(report.bytes_source)} -> {size(report.bytes_folder)} of weights, {words} than the one it came from"))]


def _figure(name: str, value: float) -> str:
    return f"{value:.1f} dB to float" if "psnr" in name else f"{value:.5f}"


def reused(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """How much of what may be reused was computed, and at which steps, if it was not all of them."""
    if not found:
        return []
    steps = [str(step + 1) for step, computed, _ in found["steps"] if computed]
    things, unit = found.get("things", "blocks"), found.get("unit", "calls")
    said = f"{len(found['parts'])} {things}, {found['share']:.0%} of their {unit} computed"
    return [("reuse", said if len(steps) == len(found["steps"]) else f"{said}: in steps {', '.join(steps)}")]


def clipped(saturation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A row on what static input scales clipped; empty if nothing was counted."""
    if not saturation or not saturation["layers"]:
        return []
    worst = saturation["layers"][0]
    whole = f"{saturation['share']:.2g}" if saturation["share"] < 1e-4 else f"{saturation['share']:.2%}"
    if not saturation["share"]:
        return [("clipped inputs", "none")]
    return [("clipped inputs", f"{whole} of values, noise {saturation['excess']:.2f} of rounding; most in {worst['name']}")]


def computed_by(kernels: Mapping[str, int], simulated: bool) -> str:
    """How many layers each kernel computes, and whether float arithmetic stands in for low-bit arithmetic."""
    said = "simulated in part: inputs are rounded, products are computed in float" if simulated else "nothing is simulated"
    return f"{', '.join(f'{name} ({count})' for name, count in kernels.items())}; {said}"


def attended_by(found: AttentionFacts | None) -> list[tuple[str, str]]:
    """A row on attention with few-bit operands, calls so far included; empty if the recipe does not ask for it."""
    if found is None:
        return []
    calls = ", ".join(f"{name} ({count})" for name, count in found.calls.items())
    return [("attention", f"{found.asked}, by {found.by}{f'; calls: {calls}' if calls else ''}")]


def worst(report: Report, count: int = WORST) -> Table:
    """The layers with the largest output error."""
    measured = sorted((x for x in report.layers if x.error is not None), key=lambda x: -(x.error or 0))
    made = table(
        f"Largest errors (of {len(measured)} layers)",
        ["layer", "role", "numbers"],
        ["error", "coverage", "TDScore"],
        hides=["coverage", "role"],
    )
    for record in measured[:count]:
        made.add_row(*_record(record))
    made.caption = "error: squared output error over the output's variance; coverage: share of the input's codes that a channel uses"
    return made


def _record(x: LayerRecord) -> tuple[str, ...]:
    return (
        x.name,
        x.role,
        numbers(x.weight, x.input),
        figure(x.error, "{:.1e}"),
        figure(x.coverage, "{:.0%}"),
        figure(x.tdscore),
    )


def skipped(report: Report) -> Table:
    """Layers that stay float, by reason."""
    rows = [(reason, _some(names)) for reason, names in report.skipped.items()]
    return facts("Skipped layers (they stay float)", rows or [("none", "")])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more


# ------------------------------------------------------------------------------------------------------------------- evaluation


def evaluation(made: Evaluation) -> list[Table]:
    """Figures beside the noise floor, missing metrics, and the verdict."""
    measured = {name: result for name, result in made.metrics.items() if result.interval is not None}
    variants = list(dict.fromkeys(variant for result in measured.values() for variant in result.floor))
    floors = [f"floor: {name}" for name in variants]
    data = made.data
    title = f"{data['test']['name']} against {data['reference']['name']}, {data['clips']} clips"
    heads = ["value", "95 % interval", "reference", *floors, "within floor"]
    figures = table(title, ["metric"], heads, hides=[*reversed(floors), "95 % interval", "reference"])
    for result in measured.values():
        figures.add_row(*_result(result, variants))
    missing = [(result.metric.title, result.missing) for result in made.metrics.values() if result.missing]
    parts = [figures, *([facts("Not measured", missing)] if missing else [])]
    return [*parts, facts("Verdict", _verdict(made))]


def evaluations(made: Evaluations) -> list[Table]:
    """A row for each of several tests, and what the gate found in each."""
    from reelquant.evidence.report.several_table import SeveralData, heads, summary_cells

    data = SeveralData.model_validate(made.data)
    title = f"{len(made.tests)} tests against {data.reference.name}, {data.clips} clips"
    first, *figures, gate = heads(data)
    rows = table(title, [first], [*figures, gate], hides=["motion", "worst clip"])
    for cells in summary_cells(data):
        rows.add_row(*(cell.text for cell in cells))
    missed = [(name, failure.sentence) for name, one in made.tests.items() if one.verdict is not None for failure in one.verdict.failures]
    notes = [(name, text) for name, one in made.tests.items() for text in one.data["warnings"]]
    return [rows, *([facts("Limits that are missed", missed)] if missed else []), *([facts("Notes", notes)] if notes else [])]


def _result(result: Result, floors: Sequence[str]) -> tuple[str | Text, ...]:
    def words(value: float | None) -> str:
        return "" if value is None else f"{value:.{result.metric.digits}f}"

    interval = result.interval
    assert interval is not None
    title = Text.assemble(result.metric.title, (f" {result.metric.unit}" if result.metric.unit else "", "dim"))
    within = {True: Text("yes", "green"), False: Text("no", "yellow"), None: ""}[result.within_floor]
    floor = [words(result.floor[name].mean) if name in result.floor else "" for name in floors]
    spread = f"{words(interval.low)} to {words(interval.high)}"
    return title, words(interval.mean), spread, words(result.reference), *floor, within


def _verdict(made: Evaluation) -> list[tuple[str, str | Text]]:
    rows: list[tuple[str, str | Text]] = [
        ("defects", f"{found['name']} in {len(found['clips'])} clips: {found['sentence']}") for found in made.data["defects"]
    ]
    lossless = made.data["near_lossless"]
    if lossless is not None:
        rows.append(("near-lossless", f"{'yes' if lossless['holds'] else 'no'}: {lossless['why']}"))
    if made.verdict is not None:
        rows.append((f"gate {made.verdict.preset}", Text("passed", "green") if made.verdict.passed else Text("failed", "red")))
        rows += [("", failure.sentence) for failure in made.verdict.failures]
        if made.verdict.skipped:
            rows.append(("not checked", ", ".join(made.verdict.skipped)))
    rows += clipped(made.data.get("saturation") or {})
    rows += reused(made.data.get("reuse"))
    rows += [("note", text) for text in made.data["warnings"]]
    return rows or [("", "no gate was asked for and no floor measured")]
