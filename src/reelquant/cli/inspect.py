"""``reelquant inspect``: what a denoiser is made of, and what its activations look like to a quantizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reelquant.cli.options import (
    Device,
    Dtype,
    Frames,
    Height,
    Json,
    Model,
    Prompts,
    Steps,
    Variant,
    Width,
    call_options,
    conditions,
    opened,
)

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from reelquant.engine.calibration import Calibration
    from reelquant.models.condition import Condition
    from reelquant.observe import InputStatistics
    from reelquant.sites import DenoiserMap

ROWS = 12  # groups and temporal layers that are printed; --all and --json give every one
STEPS, CLIPS = 10, 2  # of the sampling pass
WATCH = {  # a recipe that quantizes nothing here: it only says that every input is watched
    "name": "inspect",
    "defaults": {"weight": {"format": "int8", "granularity": "channel"}, "input": {"format": "uint8"}},
    "calibrate": {"prompts": CLIPS},
}


@dataclass(frozen=True)
class GroupFacts:
    """What the shared input of a group looks like.

    Attributes:
        low, high: over all steps, clips and channels.
        coverage: share of a per-tensor 8-bit grid that one channel uses, mean over channels.
        spread: width of the widest channel over that of the median one.
    """

    group: str
    layers: int
    role: str
    low: float
    high: float
    coverage: float
    spread: float


@dataclass(frozen=True)
class TemporalFacts:
    """The input of a temporal layer over the steps, and what uniform grids leave of it (1 is lossless)."""

    layer: str
    skewness: float
    tdscore_8: float
    tdscore_6: float
    tdscore_4: float


def inspect(
    model: Model,
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Sample two short clips to see activations, and what is clipped of them.")
    ] = True,
    everything: Annotated[bool, typer.Option("--all", help="Print every group, not only the hardest.")] = False,
    prompts: Prompts = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    variant: Variant = None,
    json: Json = False,
) -> None:
    """Roles, groups and sizes of the denoiser's layers, ranges and coverage of their inputs, temporal features.

    [bold]Examples[/bold]

    [cyan]reelquant inspect tiny-unet[/cyan]
    [cyan]reelquant inspect tiny-dit --no-run[/cyan]        only what needs no sampling
    [cyan]reelquant inspect out --json[/cyan]               a quantized folder, as data

    A channel that covers little of the grid its tensor shares loses precision; transforms (shift, range_integrate,
    scale) repair that. Temporal features are skewed; where the TDScore of a uniform grid falls below 1, denoising steps
    begin to look alike.
    """
    texts = conditions(prompts)
    pipe = opened(model, device, dtype, variant)
    data, map_ = _structure(pipe)
    if run:
        look = _clipping if data["quantized_layers"] else _activations
        data |= look(pipe, map_, texts, _call(pipe, texts, steps=steps or STEPS, frames=frames, height=height, width=width))
    _show(data, None if everything else ROWS, json)


def _call(pipe: Any, texts: list[Condition] | None, **given: Any) -> dict[str, Any]:
    """Arguments of the pipeline call, with bundled pictures where it needs some."""
    from reelquant.models.condition import fitted
    from reelquant.models.defaults import missing

    call = call_options(**given)
    return call | missing(pipe, fitted(type(pipe), texts or []), call)


def _structure(pipe: Any) -> tuple[dict[str, Any], DenoiserMap]:
    from reelquant.discover import denoiser_of, discover_or_outline, plain
    from reelquant.engine.quality import layer_bytes
    from reelquant.nn import attention_facts, get_module, kernels_of, quantized_layers

    component, denoiser = denoiser_of(pipe)
    attention = attention_facts(denoiser)  # before discovery calls it
    map_ = discover_or_outline(plain(denoiser))
    sizes = {name: layer_bytes(get_module(denoiser, name)) for name in map_.layers}
    layers = [
        {
            "name": x.name,
            "kind": x.kind,
            "role": x.role,
            "depends": sorted(x.depends),
            "shape": x.shape,
            "bytes": sizes[x.name],
        }
        for x in map_.layers.values()
    ]
    return {
        "denoiser": map_.cls,
        "component": component,
        "quantized_layers": len(quantized_layers(denoiser)),
        "kernels": asdict(kernels_of(denoiser)),
        "attention": attention and asdict(attention),
        "bytes": sum(t.numel() * t.element_size() for t in (*denoiser.parameters(), *denoiser.buffers())),
        "blocks": list(map_.blocks),
        "attention_sites": [asdict(site) for site in map_.attention],
        "arguments": {
            "latent": map_.latent_argument,
            "timestep": map_.timestep_argument,
            "prompt": map_.prompt_argument,
        },
        "notes": list(map_.notes),
        "layers": layers,
        "groups": [
            {"layers": g.layers, "role": g.role, "producer": g.producer_kind, "foldable": g.foldable, "seam": g.seam} for g in map_.groups
        ],
    }, map_


def _activations(pipe: Any, map_: DenoiserMap, texts: list[Condition] | None, call: dict[str, Any]) -> dict[str, Any]:
    calibration = _observe(pipe, map_, texts, call)
    firsts = {group.name: (group.name, group.layers, group.role) for group in map_.groups if group.name in calibration.inputs}
    groups = [_group_facts(name, len(layers), role, calibration.inputs[name]) for name, layers, role in firsts.values()]
    temporal = [_temporal_facts(name, found) for name in map_.by_role("temporal") if (found := _features(calibration, name)) is not None]
    return {
        "steps": len(calibration.steps.timesteps),
        "activations": [asdict(x) for x in sorted(groups, key=lambda x: x.coverage)],
        "temporal": [asdict(x) for x in sorted(temporal, key=lambda x: x.tdscore_8)],
    }


def _clipping(pipe: Any, map_: DenoiserMap, texts: list[Condition] | None, call: dict[str, Any]) -> dict[str, Any]:
    """What the layers of a quantized model clip of their inputs."""
    from reelquant.cli.console import Bars
    from reelquant.discover import denoiser_of
    from reelquant.models.pipelines import calibration_prompts
    from reelquant.models.sampling import sample
    from reelquant.nn import Saturation

    prompts, seen = (texts or calibration_prompts(pipe, CLIPS))[:CLIPS], Saturation()
    with Bars() as bars, seen.counting(denoiser_of(pipe)[1]):
        bars.phase("sample", len(prompts) * call["num_inference_steps"])
        sample(pipe, prompts, batch=1, output="latent", on_step=bars.advance, **call)
    return {"saturation": seen.facts(most=len(seen.layers)) | {"warning": seen.sentence()}}


def _observe(pipe: Any, map_: DenoiserMap, texts: list[Condition] | None, call: dict[str, Any]) -> Calibration:
    from reelquant.cli.console import Bars
    from reelquant.discover import denoiser_of
    from reelquant.engine.calibration import calibrate
    from reelquant.engine.plan import make_plan
    from reelquant.models.pipelines import calibration_prompts
    from reelquant.models.sampling import call_arguments
    from reelquant.recipes.recipe import load_recipe

    _, denoiser = denoiser_of(pipe)
    plan = make_plan(load_recipe(WATCH), map_, denoiser)
    prompts = (texts or calibration_prompts(pipe, CLIPS))[:CLIPS]
    with Bars() as bars:
        bars.phase("sample", len(prompts) * call["num_inference_steps"])
        return calibrate(
            pipe,
            denoiser,
            plan,
            prompts,
            seed=0,
            arguments=call_arguments(pipe, **call),
            on_step=bars.advance,
        )


def _group_facts(name: str, layers: int, role: str, statistics: InputStatistics) -> GroupFacts:
    from reelquant.formats import Granularity, Int, bind
    from reelquant.formats.criteria import coverage

    low, high = (bound.flatten(0, 1) for bound in statistics.range.envelope())
    low, high = low.amin(0), high.amax(0)  # [channels]
    grid = bind(
        Int(8, signed=False),
        Granularity("tensor"),
        low.min().clamp(max=0)[None],
        high.max().clamp(min=0)[None],
    )
    width = high - low
    assert statistics.rows is not None
    taps, channels = statistics.geometry.taps, statistics.geometry.channels
    rows = statistics.rows.rows.to(low.device)
    by_channel = rows.reshape(len(rows), channels, taps).movedim(1, 2).reshape(-1, channels)
    share = float(coverage(grid.codes(by_channel), 8))
    return GroupFacts(
        name,
        layers,
        role,
        float(low.min()),
        float(high.max()),
        share,
        float(width.max() / width.median().clamp(min=1e-12)),
    )


def _features(calibration: Calibration, name: str) -> Tensor | None:
    """``[steps, channels]``, or None if the layer's input depends on more than the timestep."""
    found = calibration.inputs[name].features if name in calibration.inputs else None
    return None if found is None or found.varies or len(found.features) < 2 else found.features


def _temporal_facts(name: str, features: Tensor) -> TemporalFacts:
    from reelquant.formats import Granularity, Int, QuantSpec, fit
    from reelquant.formats.criteria import tdscore

    away = features - features.mean()
    skewness = float(away.pow(3).mean() / away.square().mean().clamp(min=1e-20).pow(1.5))
    scores = [
        float(tdscore(features, fit(QuantSpec(Int(bits, signed=False), Granularity("tensor")), features)(features))) for bits in (8, 6, 4)
    ]
    return TemporalFacts(name, skewness, *scores)


# -------------------------------------------------------------------------------------------------------------------------- output


def _show(data: dict[str, Any], rows: int | None, json: bool) -> None:
    from reelquant.cli import console

    if json:
        return console.emit(data)
    for part in (
        _head(data),
        _roles(data),
        *([_groups(data, rows)] if "activations" in data else []),
        *([_temporal(data, rows)] if data.get("temporal") else []),
        *([_saturation(data["saturation"], rows)] if "saturation" in data else []),
    ):
        console.out.print(part)
        console.out.print()
    return None


def _head(data: dict[str, Any]) -> Table:
    from reelquant.cli.console import size
    from reelquant.cli.layout import facts
    from reelquant.cli.tables import attended_by, computed_by
    from reelquant.nn import AttentionFacts

    shared = sum(len(group["layers"]) > 1 for group in data["groups"])
    foldable, seams = (sum(bool(group[key]) for group in data["groups"]) for key in ("foldable", "seam"))
    quantized = []
    if data["quantized_layers"]:
        kernels = data["kernels"]
        quantized = [
            ("quantized", f"{data['quantized_layers']} layers"),
            ("kernels", computed_by(kernels["names"], kernels["simulated"])),
            *(("not the best kernel", f"{reason} ({count} layers)") for reason, count in kernels["refused"].items()),
            *attended_by(data["attention"] and AttentionFacts(**data["attention"])),
        ]
    return facts(
        f"{data['denoiser']} ({data['component']})",
        [
            ("size", size(data["bytes"])),
            *quantized,
            ("layers", f"{len(data['layers'])} linear and convolution layers in {len(data['blocks'])} blocks"),
            (
                "groups",
                f"{len(data['groups'])} inputs, {shared} shared; {foldable} can fold into a norm, {seams} join a skip connection",
            ),
            *_attention(data["attention_sites"]),
            ("arguments", ", ".join(f"{kind} = {name}" for kind, name in data["arguments"].items() if name)),
            *(("note", note) for note in data["notes"]),
        ],
    )


def _attention(sites: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """How many modules ask for attention, by role, and the first of each."""
    roles = dict.fromkeys(site["role"] for site in sites)
    names = {role: [site["name"] or "the denoiser itself" for site in sites if site["role"] == role] for role in roles}
    return [("attention sites", "; ".join(f"{len(those)} {role} ({those[0]} ...)" for role, those in names.items()))] if names else []


ROLE_WORDS = {
    "entry": "reads the latent itself",
    "main": "depends on the latent",
    "temporal": "depends on the timestep, not on the latent",
    "prompt": "depends on the prompt only: constant over the steps",
    "constant": "depends on nothing",
    "exit": "gives the output",
}


def _roles(data: dict[str, Any]) -> Table:
    from reelquant.cli.console import size
    from reelquant.cli.layout import table

    made = table("Roles", ["role", "its input", "first layer"], ["layers", "bytes"])
    for role, words in ROLE_WORDS.items():
        layers = [layer for layer in data["layers"] if layer["role"] == role]
        if layers:
            made.add_row(role, words, layers[0]["name"], str(len(layers)), size(sum(layer["bytes"] for layer in layers)))
    return made


def _groups(data: dict[str, Any], rows: int | None) -> Table:
    from reelquant.cli.layout import table

    found = data["activations"]
    made = table(
        _title("Inputs, hardest first", found, rows),
        ["input of", "role"],
        ["layers", "low", "high", "spread", "coverage"],
    )
    for x in found[:rows]:
        figures = (f"{x['low']:.3g}", f"{x['high']:.3g}", f"{x['spread']:.1f}x", f"{x['coverage']:.1%}")
        made.add_row(x["group"], x["role"], str(x["layers"]), *figures)
    made.caption = "spread: widest channel over the median one; coverage: share of a per-tensor 8-bit grid that a channel uses"
    return made


def _temporal(data: dict[str, Any], rows: int | None) -> Table:
    from reelquant.cli.layout import table

    found = data["temporal"]
    made = table(_title("Temporal features", found, rows), ["layer"], ["skewness", "TDScore 8 bit", "6 bit", "4 bit"])
    for x in found[:rows]:
        made.add_row(x["layer"], f"{x['skewness']:.2f}", *(f"{x[f'tdscore_{bits}']:.3f}" for bits in (8, 6, 4)))
    made.caption = "TDScore of a uniform grid: 1 keeps the denoising steps as far apart as in float, 0 merges them"
    return made


def _saturation(data: dict[str, Any], rows: int | None) -> Table:
    from reelquant.cli.layout import table

    found = data["layers"]
    made = table(_title("Clipped inputs, worst first", found, rows), ["layer"], ["clipped", "reach", "clipping", "rounding"])
    for x in found[:rows]:
        made.add_row(x["name"], f"{x['share']:.3%}", f"{x['reach']:.2f}x", f"{x['noise']:.1e}", f"{x['rounding']:.1e}")
    steps = max(data["steps"], key=lambda one: one["share"], default=None)
    most = f"; most is clipped in step {steps['step']} ({steps['share']:.3%})" if steps and steps["share"] else ""
    warning = f"\n{data['warning']}" if data["warning"] else ""
    made.caption = f"reach: farthest value over the range; clipping, rounding: their noise over the input's power{most}{warning}"
    return made


def _title(words: str, found: list[Any], rows: int | None) -> str:
    return f"{words} ({len(found)})" if rows is None or len(found) <= rows else f"{words} ({rows} of {len(found)}; --all prints every one)"
