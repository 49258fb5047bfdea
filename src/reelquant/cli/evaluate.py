"""``reelquant evaluate``: a quantized pipeline against its float original, on video."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reelquant.cli.options import (
    GATES,
    Device,
    Dtype,
    Force,
    Frames,
    Guidance,
    Height,
    Json,
    Prompts,
    Reference,
    Steps,
    Variant,
    Width,
    call_options,
    check_device,
    conditions,
    more_help,
    seed_within_bounds,
    torch_dtype,
)
from reelquant.cli.ranks import sharing

if TYPE_CHECKING:
    from reelquant.evidence.run import Options

FAILED = 1

Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metrics",
        "-m",
        help="Names or groups, comma separated: psnr,fvd | quick | default | all. See `reelquant metrics`.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", help="Folder with weights of I3D, LPIPS, RAFT ...; else the cache.", show_default=False),
]
Data = Annotated[Path | None, typer.Option("--data", help="Folder of real clips, for FVD, FID and KID to data.", show_default=False)]
Gate = Annotated[
    str | None,
    typer.Option(
        "--gate",
        help="strict, default or loose: exit code 1 if a limit is missed.",
        show_default=False,
        autocompletion=GATES,
    ),
]
FailUnder = Annotated[
    list[str] | None,
    typer.Option("--fail-under", metavar="METRIC=VALUE", help="Exit code 1 if the metric is worse. Repeatable."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")]
FidFrames = Annotated[
    int,
    typer.Option("--fid-frames", min=0, help="Frames of a clip that FID and KID look at, evenly spaced; 0 for all."),
]
ClipModel = Annotated[str | None, typer.Option("--clip-model", help="CLIP of transformers for the text metrics: folder or hub id.")]
Shown = Annotated[int, typer.Option("--shown", min=0, help="Clips in the report, the worst first.")]

QuantizedFolders = Annotated[
    list[str],
    typer.Argument(metavar="MODEL...", help="The quantized pipeline's folder; several make one page of all.", show_default=False),
]
Speed = Annotated[bool, typer.Option("--speed", help="Also time the pipelines in turns, and measure peak memory.")]
Clips = Annotated[
    int | None,
    typer.Option("--clips", "-n", min=1, help="Clips to sample; by default 16, or one per prompt."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for clips and report. Default: MODEL-evaluation.")]
Floor = Annotated[
    str | None,
    typer.Option(
        "--floor",
        help="Float runs that show the noise floor: bf16, rounded, float32, compiled, reseed, none; commas.",
    ),
]
GrainSteps = Annotated[
    str | None,
    typer.Option("--grain-steps", metavar="5,20,50", help="Also sample flat scenes at these steps: does noise grow?"),
]
Seed = Annotated[int, typer.Option("--seed", callback=seed_within_bounds, help="Noise of the first clip.")]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Clips per pipeline call.")]
Reuse = Annotated[
    Path | None,
    typer.Option("--reuse", help="Evaluation with the same float clips.", show_default=False),
]
Map = Annotated[
    Path | None,
    typer.Option("--map", help="Folder of `reelquant sensitivity`: draw its map into the report.", show_default=False),
]


@more_help("""
    [bold]Examples[/bold]

    [cyan]reelquant evaluate out --reference tiny-dit[/cyan]
    [cyan]reelquant evaluate out --reference tiny-dit -n 64 --gate default -o proof[/cyan]
    [cyan]reelquant evaluate out --reference Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts texts.txt --dtype bfloat16 --device cuda[/cyan]
    [cyan]reelquant evaluate out --reference wan-i2v --conditions clips.jsonl -n 8[/cyan]      pictures and texts, see [cyan]quantize[/cyan]
    [cyan]reelquant evaluate out --reference tiny-dit -m fvd,psnr --data real-clips --weights weights[/cyan]
    [cyan]reelquant evaluate w8a8 w4a8 w4a16 --speed -o recipes[/cyan]      one page for several; float clips are made once
    [cyan]reelquant evaluate out --reference tiny-dit --fail-under psnr=30 --fail-under motion_deviation=0.1[/cyan]

    Every figure stands beside the noise floor: the float pipeline run again in bf16 (or rounded to it where the processor has
    no bf16, or compiled, or from other noise). After the first steps a line says how long all of it will take.
    Metrics whose weights are missing are listed with the command that gets them. A run that was stopped continues with
    [cyan]--resume[/cyan]. Open [cyan]report.html[/cyan] in the output folder; [cyan]summary.md[/cyan] is for a pull
    request.
""")
def evaluate(
    models: QuantizedFolders,
    reference: Reference = None,
    prompts: Prompts = None,
    clips: Clips = None,
    metrics: Metrics = None,
    output: Output = None,
    weights: Weights = None,
    data: Data = None,
    floor: Floor = None,
    grain_steps: GrainSteps = None,
    gate: Gate = None,
    fail_under: FailUnder = None,
    seed: Seed = 50_000,
    batch: Batch = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    variant: Variant = None,
    clip_model: ClipModel = None,
    shown: Shown = 12,
    reuse: Reuse = None,
    sensitivity: Map = None,
    speed: Speed = False,
    fid_frames: FidFrames = 0,
    resume: Resume = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Sample quantized and float pipelines from the same texts and noise, measure what quantization changed, and write a report."""
    from reelquant.models.origin import float_original
    from reelquant.models.pipelines import locate

    reference = reference or float_original(models[0])
    for name in (*models, reference):
        locate(name)  # before the slow imports
    folders = dict(output=output or _default_output(models), weights=weights, data=data, reuse=reuse, sensitivity=sensitivity)
    figures = dict(metrics=metrics, gate=gate, fail_under=fail_under, clip_model=clip_model, fid_frames=fid_frames, speed=speed)
    shared = sharing(folders["output"])
    options = make_options(device=device, resume=resume, force=force, shown=shown, shared=shared, **folders, **figures)
    check_device(device)
    clip = dict(seed=seed, batch=batch, dtype=torch_dtype(dtype), files=variant) | _clips(prompts, clips)
    floors = dict(floor=None if floor is None else floor.split(","), grain_steps=_steps(grain_steps))
    call = call_options(steps=steps, frames=frames, height=height, width=width, guidance=guidance)
    from reelquant.evidence import run, several

    with listening(options) as heard:
        if len(models) == 1:
            made = run.evaluate(models[0], reference, options=heard, **clip, **floors, **call)
        else:
            made = several.evaluate_several(models, reference, options=heard, **clip, **floors, **call)
    if made is not None:  # another process of the same command has it
        finish(made, json)


def _default_output(models: list[str]) -> Path:
    """Named after the test, or after the first of several and their number."""
    first = Path(models[0]).name
    return Path(f"{first}-evaluation" if len(models) == 1 else f"{first}-and-{len(models) - 1}-more-evaluation")


def _steps(text: str | None) -> list[int]:
    from reelquant._errors import RecipeError

    try:
        found = [int(one) for one in (text or "").split(",") if one.strip()]
    except ValueError:
        found = [0]
    if any(one < 1 for one in found):
        raise RecipeError(f"--grain-steps takes numbers of steps, got '{text}'; for example --grain-steps 5,20,50")
    return found


def make_options(**given: Any) -> Options:
    """Options by the names of :class:`~reelquant.evidence.run.Options`; None and empty lists leave the default.

    Raises:
        CheckpointError: if a folder that is read does not exist, or the output takes no files.
        RecipeError: for an unknown metric, gate or limit.
    """
    from reelquant._errors import CheckpointError
    from reelquant.checkpoint import check_writable
    from reelquant.cli.console import quiet_loading
    from reelquant.evidence.run import Options

    for name in ("weights", "data", "reuse"):
        folder = given.get(name)
        if folder is not None and not folder.is_dir():
            raise CheckpointError(f"--{name}: no folder at '{folder}'")
    if given["output"] is not None:
        check_writable(given["output"])
    quiet_loading()
    known = {name: value for name, value in given.items() if value not in (None, [])}
    return Options(**known, command=shlex.join(["reelquant", *sys.argv[1:]]))


def listening(options: Options) -> Any:
    """The options with progress bars that live as long as the ``with`` block."""
    from contextlib import contextmanager

    from reelquant.cli.console import Bars
    from reelquant.cli.signals import left_in

    @contextmanager
    def opened() -> Any:
        with left_in(options.output and Path(options.output)), Bars() as bars:
            options.progress = bars
            yield options

    return opened()


def _clips(file: Path | None, count: int | None) -> dict[str, Any]:
    """Texts and number of clips; by default one clip per text of the file."""
    if file is None:
        return {"prompts": None, "clips": count or 16}
    found = conditions(file)
    return {"prompts": found, "clips": count or len(found or ())}


def finish(made: Any, json: bool | None) -> None:
    """Print the outcome as JSON (True), as tables (False) or not at all (None); exit code 1 if a gate was missed."""
    from reelquant._errors import printable
    from reelquant.cli import console, tables

    if json:
        console.emit(_document(made))
    elif json is not None:
        for part in tables.evaluation(made) if _tests(made) is None else tables.evaluations(made):
            console.out.print(part)
            console.out.print()
        if made.folder is not None:
            console.done(made.folder / "report.html", "look at this first")
    if not made.passed:
        for name, one in (_tests(made) or {"": made}).items():
            for failure in one.verdict.failures:
                subject = f"{name}: " if name else ""
                typer.echo(printable(f"reelquant: {subject}gate {one.verdict.preset}: {failure.sentence}"), err=True)
        raise typer.Exit(FAILED)


def _document(made: Any) -> dict[str, Any]:
    """All of an evaluation; of one test every metric by its name as well, of several every test by its own."""
    if (tests := _tests(made)) is None:
        return {name: made[name] for name in made.metrics} | made.to_json() | {"output": made.folder}
    figures = {name: {metric: one[metric] for metric in one.metrics} for name, one in tests.items()}
    return made.to_json() | {"figures": figures, "output": made.folder}


def _tests(made: Any) -> dict[str, Any] | None:
    """The evaluations of several tests by name; None if it is one evaluation."""
    return getattr(made, "tests", None)
