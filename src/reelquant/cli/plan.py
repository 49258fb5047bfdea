"""``reelquant plan``: which recipes let a pipeline fit into a budget of memory, and what they cost."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reelquant.cli import console
from reelquant.cli.benchmark import Threads
from reelquant.cli.options import (
    ALLOCATORS,
    Force,
    Frames,
    Guidance,
    Height,
    Json,
    Model,
    Steps,
    Width,
    call_options,
    more_help,
    recipe_names,
    torch_dtype,
)
from reelquant.recipes.usual import FIRST, SAFE

if TYPE_CHECKING:
    from reelquant.cli.layout import Plain
    from reelquant.planning import Planned, Way

FloatDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Type of the float parts: float32, bfloat16 or float16. Default: bfloat16, or float32 on processors that only emulate it.",
        show_default=False,
    ),
]
MaxMemory = Annotated[
    str, typer.Option("--max-memory", metavar="SIZE", help="12GB, 500MB: of the device, or of the process on a CPU.", show_default=False)
]
Where = Annotated[str, typer.Option("--device", help="Device that the pipeline will run on; it may be on another machine.")]
MinSpeed = Annotated[
    float | None, typer.Option("--min-speed", min=0.01, help="How many times faster than in float a step has to be.", show_default=False)
]
Bits = Annotated[
    float | None,
    typer.Option(
        "--bits", help="Bits per weight on average: every layer of the denoiser then gets a format of its own.", show_default=False
    ),
]
Recipes = Annotated[
    str | None,
    typer.Option(
        "--recipes",
        help="Recipes to try for the denoiser, with commas, the preferred one first.",
        show_default=False,
        autocompletion=recipe_names,
    ),
]
Map = Annotated[
    Path | None,
    typer.Option(
        "--map", help="Folder of `reelquant sensitivity`, by which formats are chosen; an empty or new one is filled.", show_default=False
    ),
]
Allocate = Annotated[
    str,
    typer.Option(
        "--allocate", help="How bits are divided among layers: milp, greedy, sampled, surrogate.",
        autocompletion=ALLOCATORS,
    ),
]  # fmt: skip
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write the recipe here if it is not one of the library.", show_default=False)
]


FLOAT = "float"


def _names(text: str) -> list[str]:
    from reelquant._errors import RecipeError

    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise RecipeError(f"--recipes names none, got '{text}'; for example --recipes {FIRST},{SAFE}")
    return found


@more_help("""
    [bold]Examples[/bold]

    [cyan]reelquant plan tiny-dit --max-memory 1GB[/cyan]
    [cyan]reelquant plan wan-1.3b --max-memory 12GB --frames 81 --height 480 --width 832[/cyan]
    [cyan]reelquant plan wan-1.3b --max-memory 12GB --device cuda[/cyan]      for a card that is elsewhere: no speeds
    [cyan]reelquant plan wan-1.3b --max-memory 12GB --min-speed 1.5 --recipes qvd-w8a8,qvd-w4a8[/cyan]
    [cyan]reelquant plan wan-1.3b --max-memory 6GB --bits 4.5 --map map -o recipe.yaml[/cyan]

    The stock pipeline is run once at this size with models that compute nothing, and what it would hold in memory is counted. Speeds
    come from kernels that are timed on this machine, once, at the shapes of the layers. Quality is printed only where it was measured.

    Weights are loaded only to choose a format for each layer (--bits, or where no whole recipe fits). The effect of rounding each layer
    is then measured, unless --map names a folder that holds it. A run that was stopped goes on with the same command.
""")
def plan(
    model: Model,
    max_memory: MaxMemory,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    steps: Steps = None,
    guidance: Guidance = None,
    device: Where = "cpu",
    dtype: FloatDtype = None,
    min_speed: MinSpeed = None,
    bits: Bits = None,
    recipes: Recipes = None,
    map: Map = None,
    allocate: Allocate = "milp",
    threads: Threads = None,
    output: Output = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Find recipes that fit into a memory budget, and print size, peak, speed and the command to run."""
    from reelquant._errors import CheckpointError
    from reelquant.models.pipelines import locate

    locate(model)
    kind = None if dtype is None else torch_dtype(dtype)
    if output is not None and output.exists() and not force:
        raise CheckpointError(f"'{output}' exists; choose another file, or --force")
    if map is not None and map.exists() and not map.is_dir():
        raise CheckpointError(f"--map: '{map}' is a file; give the folder that reelquant sensitivity wrote, or the name of a new one")
    names = None if recipes is None else _names(recipes)
    console.quiet_loading()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from reelquant.api import plan as run

    call = call_options(frames=frames, height=height, width=width, steps=steps, guidance=guidance)
    how = dict(device=device, dtype=kind, min_speed=min_speed, bits=bits, recipes=names, map=map, allocate=allocate)
    with console.Bars() as bars:
        found = run(model, max_memory=max_memory, **how, progress=bars, **call)
    written = _written(found.best, output)
    command = found.best.command
    for name, file in written.items():  # the command names files as the user does
        command = command.replace(name, shlex.quote(str(file)))
    found = replace(found, best=replace(found.best, command=command))
    if json:
        console.emit(found.to_json() | {"written": [str(file) for file in written.values()]})
        return
    for part in tables(found):
        console.out.print(part)
        console.out.print()
    for file in written.values():
        console.done(file)
    if found.best.own and not written:
        console.out.print("[dim]the recipe is not in the library: -o recipe.yaml writes it[/dim]")


def _written(best: Way, output: Path | None) -> dict[str, Path]:
    """Write the recipes of a way that are not in the library, by the names that its command has for them. Several have the name of their
    component at the end."""
    from reelquant.evidence.store import write_text

    if output is None:
        return {}
    places = {name: output.with_stem(output.stem + name.removeprefix("recipe").removesuffix(".yaml")) for name in best.own}
    for name, file in places.items():
        write_text(file, best.own[name])
    return places


def tables(found: Planned) -> list[Plain]:
    """The answer, what else fits, and what was counted."""
    return [_answer(found), _ways(found), _components(found)]


def _answer(found: Planned) -> Plain:
    from reelquant.cli.layout import facts

    best, size = found.best, console.size
    where = {"none": "", "model": ", one component on the device at a time", "group": ", a block on the device at a time"}[best.offload]
    speed = best.speed if isinstance(best.speed, str) else f"a step {best.speed:.2f}x as fast as float{_band(found, 'speed')}"
    speed = "that of float" if best.quality == FLOAT else speed
    rows = [
        ("fits", f"{best.words}: {size(best.peak)} peak{_band(found, 'memory')} of {size(found.budget)}{where}"),
        ("clip", f"{'x'.join(map(str, found.clip)) or 'not decoded'}, {found.steps} steps, {found.dtype} on {found.device}"),
        ("folder", size(best.size)),
        ("speed", speed),
        ("quality", best.quality if best.quality in (FLOAT, "not measured") else f"{best.quality} PSNR of clips to float"),
        ("run", best.command),
        *([("then", OFFLOAD[best.offload])] if best.offload != "none" else []),
    ]
    return facts(f"{found.model} in {size(found.budget)}", rows)


OFFLOAD = {
    "model": "pipe.enable_model_cpu_offload()",
    "group": "pipe.enable_group_offload(torch.device('cuda'), offload_type='block_level', num_blocks_per_group=1)",
}


def _band(found: Planned, what: str) -> str:
    """How far off a prediction may be."""
    band = found.bands[what]
    return " (error not measured on such a device)" if band is None else f" \u00b1{100 * band:.0f} %"


def _ways(found: Planned) -> Plain:
    from reelquant.cli.layout import table

    made = table("Ways that fit, and float", ["recipes", "offload", "quality"], ["folder", "peak", "speed"], hides=["folder"])
    ways = [found.best, *found.others]
    for way in ways if found.as_it_is in ways else [*ways, found.as_it_is]:
        fits = way.peak <= found.budget
        speed = f"{way.speed:.2f}x" if isinstance(way.speed, float) else way.speed
        words = way.words if fits else f"{way.words}: too large"
        made.add_row(words, way.offload, way.quality, console.size(way.size), console.size(way.peak), speed)
    return made


def _components(found: Planned) -> Plain:
    from reelquant.cli.layout import table

    made = table("What was counted, in float", ["component", "what it is"], ["weights", "while it runs"])
    for name, one in found.components.items():
        made.add_row(name, one["kind"], console.size(one["bytes"]), console.size(one["running"]))
    if found.base:
        made.add_row("the process", "Python and libraries", console.size(found.base), "")
    return made
