"""``reelquant evaluate``: a quantized pipeline against its float original, on video."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reelquant.cli.options import Device, Dtype, Force, Frames, Guidance, Height, Json, Prompts, Steps, Width, call_options

if TYPE_CHECKING:
    from reelquant.evidence.run import Options
    from reelquant.models.prompts import Prompt

FAILED = 1

Metrics = Annotated[
    list[str] | None,
    typer.Option("--metrics", "-m", help="Names or groups, comma separated: psnr,fvd | quick | default | all. See `reelquant metrics`."),
]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="Folder with weights of I3D, LPIPS, RAFT ...; else the cache.", show_default=False)
]
Data = Annotated[Path | None, typer.Option("--data", help="Folder of real clips, for FVD, FID and KID to data.", show_default=False)]
Gate = Annotated[str | None, typer.Option("--gate", help="strict, default or loose: exit code 1 if a limit is missed.", show_default=False)]
FailUnder = Annotated[
    list[str] | None,
    typer.Option("--fail-under", metavar="METRIC=VALUE", help="Exit code 1 if the metric is worse than that. Repeatable."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")]
FidFrames = Annotated[int, typer.Option("--fid-frames", min=0, help="Frames of a clip that FID and KID look at, evenly spaced; 0 for all.")]
ClipModel = Annotated[str | None, typer.Option("--clip-model", help="CLIP of transformers for the text metrics: folder or hub id.")]
Shown = Annotated[int, typer.Option("--shown", min=0, help="Clips in the report, the worst first.")]


def evaluate(
    model: Annotated[str, typer.Argument(help="The quantized pipeline's folder.", show_default=False)],
    reference: Annotated[str, typer.Option("--reference", "-r", help="The float pipeline: name, folder or hub id.", show_default=False)],
    prompts: Prompts = None,
    clips: Annotated[int | None, typer.Option("--clips", "-n", min=1, help="Clips to sample; by default 16, or one per prompt.")] = None,
    metrics: Metrics = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for clips and report. Default: MODEL-evaluation.")] = None,
    weights: Weights = None,
    data: Data = None,
    floor: Annotated[
        str | None, typer.Option("--floor", help="Float runs that show the noise floor: bf16, float32, compiled, reseed, none; commas.")
    ] = None,
    grain_steps: Annotated[
        str | None, typer.Option("--grain-steps", metavar="5,20,50", help="Also sample flat scenes at these steps: does noise grow?")
    ] = None,
    gate: Gate = None,
    fail_under: FailUnder = None,
    seed: Annotated[int, typer.Option("--seed", help="Noise of the first clip.")] = 50_000,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Clips per pipeline call.")] = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    clip_model: ClipModel = None,
    shown: Shown = 12,
    reuse: Annotated[Path | None, typer.Option("--reuse", help="Evaluation with the same float clips.", show_default=False)] = None,
    fid_frames: FidFrames = 0,
    resume: Resume = False,
    force: Force = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Sample both pipelines from the same texts and noise, measure what quantization changed, and write a report to look at.

    [bold]Examples[/bold]

    [cyan]reelquant evaluate out --reference tiny-dit[/cyan]
    [cyan]reelquant evaluate out -r tiny-dit -n 64 --gate default -o proof[/cyan]
    [cyan]reelquant evaluate out -r Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts texts.txt --dtype bfloat16 --device cuda[/cyan]
    [cyan]reelquant evaluate out -r tiny-dit -m fvd,psnr --data real-clips --weights weights[/cyan]
    [cyan]reelquant evaluate out -r tiny-dit --fail-under psnr=30 --fail-under motion_deviation=0.1[/cyan]

    Every figure stands beside the noise floor: the float pipeline run again in bf16 (or compiled, or from other noise). Metrics whose
    weights are not here are listed with the command that gets them. A run that was stopped goes on with [cyan]--resume[/cyan].
    Open [cyan]report.html[/cyan] in the output folder; [cyan]summary.md[/cyan] is for a pull request.
    """
    from reelquant.models.pipelines import locate

    for one in (model, reference):
        locate(one)
    options = make_options(
        metrics, output or Path(f"{Path(model).name}-evaluation"), weights, data, gate, fail_under, clip_model, device,
        resume=resume, force=force, shown=shown, fid_frames=fid_frames, reuse=reuse,
    )  # fmt: skip
    from reelquant.cli.options import torch_dtype
    from reelquant.evidence.run import evaluate as run

    texts = _texts(prompts)
    count = clips or (16 if texts is None else len(texts))
    from reelquant.cli.options import check_device

    check_device(device)
    call = call_options(steps=steps, frames=frames, height=height, width=width, guidance=guidance)
    with listening(options) as heard:
        made = run(
            model, reference, texts, clips=count, seed=seed, floor=None if floor is None else floor.split(","),
            grain_steps=_steps(grain_steps), batch=batch, dtype=torch_dtype(dtype), options=heard, **call,
        )  # fmt: skip
    finish(made, json)


def _steps(text: str | None) -> list[int]:
    from reelquant._errors import RecipeError

    try:
        found = [int(one) for one in (text or "").split(",") if one.strip()]
    except ValueError:
        found = [0]
    if any(one < 1 for one in found):
        raise RecipeError(f"--grain-steps takes numbers of steps, got '{text}'; for example --grain-steps 5,20,50")
    return found


def make_options(
    metrics: list[str] | None, output: Path | None, weights: Path | None, data: Path | None, gate: str | None,
    fail_under: list[str] | None, clip_model: str | None, device: str, **others: Any,
) -> Options:  # fmt: skip
    """Options from the command line; wrong ones are refused before anything slow begins."""
    from reelquant._errors import CheckpointError
    from reelquant.cli.console import quiet_loading
    from reelquant.evidence.run import Options
    from reelquant.evidence.text import CLIP

    for name, folder in (("--weights", weights), ("--data", data), ("--reuse", others.get("reuse"))):
        if folder is not None and not folder.is_dir():
            raise CheckpointError(f"{name}: no folder at '{folder}'")
    quiet_loading()
    return Options(
        metrics or ("default",), output, weights, data, gate, fail_under or (), clip_model or CLIP, device,
        command=shlex.join(["reelquant", *sys.argv[1:]]), **others,
    )  # fmt: skip


def listening(options: Options) -> Any:
    """The options with progress bars that live as long as the ``with`` block."""
    from contextlib import contextmanager

    from reelquant.cli.console import Bars
    from reelquant.cli.errors import kept_in

    @contextmanager
    def opened() -> Any:
        with kept_in(options.output and Path(options.output)), Bars() as bars:
            options.progress = bars
            yield options

    return opened()


def _texts(file: Path | None) -> list[Prompt] | None:
    if file is None:
        return None
    from reelquant.models.prompts import load_prompts

    return load_prompts(file)


def finish(made: Any, json: bool | None) -> None:
    """Print the outcome, as one JSON document, in words, or not at all (None); exit code 1 if a gate was missed."""
    from reelquant.cli import console, tables

    if json:
        console.emit({name: made[name] for name in made.metrics} | made.to_json() | {"output": made.folder})
    elif json is not None:
        for part in tables.evaluation(made):
            console.out.print(part)
            console.out.print()
        if made.folder is not None:
            console.out.print(f"[green]✓[/green] {made.folder / 'report.html'}  [dim]look at this first[/dim]", soft_wrap=True)
    if not made.passed:
        for failure in made.verdict.failures:
            typer.echo(f"reelquant: gate {made.verdict.preset}: {failure.sentence}", err=True)
        raise typer.Exit(FAILED)
