"""``reelquant drop-blocks``: a float pipeline with fewer blocks, trained to give what it gave."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reelquant.cli import console
from reelquant.cli.options import (
    Device,
    Force,
    Frames,
    Guidance,
    Height,
    Json,
    Model,
    NewFolder,
    Prompts,
    Steps,
    Variant,
    Width,
    call_options,
    conditions,
    more_help,
    one_of,
    opened,
    seed_within_bounds,
)
from reelquant.recipes.usual import FIRST

if TYPE_CHECKING:
    from reelquant.cli.layout import Plain
    from reelquant.removal.written import Report

CHOICES = ("measured", "shallow", "deep")
WORK = ".removal"

Count = Annotated[
    str | None,
    typer.Option(
        "--blocks",
        metavar="NUMBERS",
        help="The blocks to drop, counted from 0: 1,4. Without it, --count and --choose decide.",
        show_default=False,
    ),
]
Number = Annotated[int, typer.Option("--count", min=1, help="How many blocks to drop.")]
Choose = Annotated[
    str,
    typer.Option(
        "--choose",
        help="measured: those without which outputs change least; shallow: those behind the first; deep: those before the last.",
        autocompletion=one_of(*CHOICES),
    ),
]
Calls = Annotated[
    int, typer.Option("--calls", min=1, help="Calls of the denoiser to record: a quarter is held out to decide, the others train.")
]
Iterations = Annotated[int, typer.Option("--iterations", min=0, help="Steps of training, a recorded call each; 0 for none.")]
Rate = Annotated[float, typer.Option("--rate", help="Learning rate of Adam; it falls to zero.")]
Motion = Annotated[float, typer.Option("--motion", help="Weight of the differences of neighbouring frames beside the output.")]
Seed = Annotated[int, typer.Option("--seed", callback=seed_within_bounds, help="Seed of the recorded clips and of the order of training.")]


@more_help("""
    [bold]Examples[/bold]

    [cyan]reelquant drop-blocks tiny-dit -o smaller[/cyan]      one block less, and 300 steps of training
    [cyan]reelquant drop-blocks tiny-dit -o smaller --count 2 --iterations 2000 --calls 256[/cyan]
    [cyan]reelquant drop-blocks tiny-dit -o smaller --blocks 3 --iterations 0[/cyan]      without training
    [cyan]reelquant quantize smaller -r qvd-w8a8 -o out[/cyan]

    Blocks of a transformer are a chain, and a chain without one of them is a smaller model of the same class. Clips are sampled, and
    calls of the denoiser are recorded. The blocks without which held-out calls change least go, and the weights of the others are trained
    to give what was recorded. Training that does not lower the error on held-out calls is undone.

    The result is a float pipeline: stock from_pretrained opens it, its files are smaller, and a clip takes less time. It is another
    model: look at [cyan]reelquant compare[/cyan] before you keep it. UNets hand skips from block to block, and are refused.

    What is done is kept in the folder OUTPUT.removal until the new folder is written: a run that was stopped goes on from there if
    the same command is given again.
""")
def drop_blocks(
    model: Model,
    output: NewFolder,
    blocks: Count = None,
    count: Number = 1,
    choose: Choose = "measured",
    calls: Calls = 64,
    iterations: Iterations = 300,
    rate: Rate = 3e-4,
    motion: Motion = 1.0,
    seed: Seed = 0,
    prompts: Prompts = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    device: Device = "cpu",
    variant: Variant = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Drop transformer blocks of a float pipeline, train the others to make up for them, and write what is left as a stock folder."""
    from reelquant.checkpoint import check_target, check_writable, refuse_source

    wanted = _numbers(blocks) if blocks is not None else count
    check_target(output, force=force)
    refuse_source(output, model)
    check_writable(output)
    pipe = opened(model, device, "float32", variant)
    from reelquant.api import drop_blocks as run
    from reelquant.removal.written import write

    call = call_options(steps=steps, frames=frames, height=height, width=width, guidance=guidance)
    how = dict(choose=choose, calls=calls, iterations=iterations, rate=rate, motion=motion, seed=seed, prompts=conditions(prompts))
    work = output.with_name(output.name + WORK)
    with _kept(work), console.Bars() as bars:
        made = run(pipe, wanted, work=work, progress=bars, **how, **call)
        bars.phase("write", 1)
        report = write(pipe, made, output, force=force)
    shutil.rmtree(work, ignore_errors=True)
    if json:
        console.emit(report.to_json())
        return
    console.out.print(table(report))
    console.out.print()
    console.done(output, f"next: reelquant quantize {output} -r {FIRST} -o quantized")


def _kept(work: Path) -> Any:
    from reelquant.cli.signals import keeping

    return keeping(lambda: f"what is done is in '{work}': run the same command again to go on" if work.is_dir() else "")


def _numbers(text: str) -> list[int]:
    from reelquant._errors import RecipeError

    try:
        return [int(one) for one in text.split(",")]
    except ValueError:
        raise RecipeError(f"--blocks takes numbers of blocks, counted from 0, got '{text}'; for example --blocks 1,4") from None


def table(report: Report) -> Plain:
    """What was dropped, and what is left."""
    from reelquant._numbers import size
    from reelquant.cli.layout import facts

    made = report.made
    before, after = made.parameters
    gone = ", ".join(map(str, made.blocks))
    rows = [
        ("dropped", f"{made.component}: block {gone} of {made.left + len(made.blocks)}, counted from 0; {made.setting} is {made.left}"),
        ("parameters", f"{before:,} -> {after:,} ({after / before:.0%})"),
        ("error", f"{made.error[0]:.4f} of the output's variance on held-out calls, {_trained(made.error)}"),
    ]
    if report.bytes_source and report.bytes_folder:
        rows.append(("folder", f"{size(report.bytes_source)} -> {size(report.bytes_folder)} of weights"))
    return facts("Blocks that are gone", rows)


def _trained(error: tuple[float, float]) -> str:
    return f"{error[1]:.4f} after training" if error[1] < error[0] else "and training did not lower it, or there was none"
