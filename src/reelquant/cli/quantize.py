"""``reelquant quantize``: a float pipeline in, a quantized folder out, with the proof."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reelquant.cli.options import Device, Dtype, Force, Json, Model, Prompts, Steps, call_options, opened, settings

if TYPE_CHECKING:
    from reelquant.evidence.evaluation import Evaluation
    from reelquant.recipes.recipe import Recipe
    from reelquant.recipes.report import Report
    from reelquant.recipes.stream import Job

GATE_CLIPS = 8


def quantize(
    model: Model,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A name from `reelquant recipes`, or a YAML file.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write; must be new.", show_default=False)] = None,
    prompts: Prompts = None,
    steps: Steps = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the first calibration clip.", show_default=False)] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Layers that stay float: name, glob, re:REGEX, role:ROLE. Repeatable.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: calibrate.prompts=8. Repeatable.")
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option("--gate", help="Afterwards hold 8 clips against float: strict, default or loose; exit code 1 if a limit is missed."),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option("--max-memory", metavar="SIZE", help="8GB, 500MB: a model that does not fit is streamed. By default what is free."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run; begin, if there is none.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what every layer would become, what it takes, and stop.")] = False,
    force: Force = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Quantize a pipeline's denoiser and save the whole pipeline as a stock diffusers folder.

    [bold]Examples[/bold]

    [cyan]reelquant quantize tiny-dit -r qvd-w8a8 -o out[/cyan]
    [cyan]reelquant quantize tiny-dit -r qvd-w8a8 --dry-run[/cyan]      the plan, nothing else
    [cyan]reelquant quantize Wan-AI/Wan2.1-T2V-1.3B-Diffusers -r w8a16 -o wan[/cyan]
    [cyan]reelquant quantize wan-14b -r w8a16 -o out --dtype bfloat16 --max-memory 8GB[/cyan]      never the whole model in memory
    [cyan]reelquant quantize wan-14b -r w8a16 -o out --dtype bfloat16 --max-memory 8GB --resume[/cyan]      after a crash
    [cyan]reelquant quantize my-folder -r my.yaml -o out --prompts texts.txt[/cyan]
    [cyan]reelquant quantize tiny-dit -r qvd-w8a8 -o out --gate default[/cyan]
    [cyan]reelquant quantize tiny-unet -r qvd-w4a8 -o out --exclude down_blocks.0 \
        --set search.scope=family[/cyan]

    Afterwards [cyan]reelquant generate out -p "..." -o clip.mp4[/cyan], or in Python
    [cyan]import reelquant; DiffusionPipeline.from_pretrained("out")[/cyan].
    """
    if output is None and not dry_run:
        raise typer.BadParameter("say where to write (or try --dry-run)", param_hint="--output")
    if output is not None and not dry_run:
        from reelquant.checkpoint import check_target

        check_target(output, force=force)
    if gate is not None:
        from reelquant.evidence.gate import check_preset

        check_preset(gate)
    chosen = _recipe(recipe, settings(change or []), seed)
    texts = _texts(prompts)
    call = call_options(steps=steps)
    job = _job(model, chosen, texts, exclude or [], dtype, device, max_memory, call)
    if dry_run or output is None:
        _show_plan(job, json)
        return
    if resume or job.estimate().in_memory > job.budget:
        document = _stream(job, output, resume, force, json)
    else:
        document = _run(opened(model, device, dtype), chosen, texts, exclude or [], call, output, force, json)
    made = None if gate is None else _hold_against(model, output, texts, gate, device, dtype, call)
    _finish(document, made, json)


def _recipe(source: str, changes: dict[str, Any], seed: int | None) -> Recipe:
    from reelquant.recipes.recipe import load_recipe

    found = load_recipe(source, changes)
    return found if seed is None or found.data_free else load_recipe(found, {"calibrate.seed": seed})


def _texts(file: Path | None) -> list[str] | None:
    if file is None:
        return None
    from reelquant.models.prompts import read_prompts

    return read_prompts(file)


def _job(
    model: str, recipe: Recipe, texts: list[str] | None, exclude: list[str], dtype: str, device: str, max_memory: str | None,
    call: dict[str, Any],
) -> Job:  # fmt: skip
    """The work, planned from headers alone."""
    from reelquant.cli.options import check_device, torch_dtype
    from reelquant.models.pipelines import locate

    kind = torch_dtype(dtype)
    locate(model)  # before the slow imports
    check_device(device)
    from reelquant.api import folder_job

    return folder_job(model, recipe, texts, None, exclude, None, kind, device, max_memory, call)


def _show_plan(job: Job, json: bool) -> None:
    from reelquant.cli import console, tables

    expected = job.estimate()
    for plan in job.plans.values():
        if json:
            console.emit(tables.plan_json(plan) | {"estimate": tables.estimate_json(job, expected)})
        else:
            console.out.print(tables.plan_table(plan))
    if not json:
        console.out.print(tables.estimate_table(job, expected))
        console.out.print("[dim]dry run: nothing was changed or written[/dim]")


def _stream(job: Job, output: Path, resume: bool, force: bool, json: bool) -> dict[str, Any]:
    """Quantize from disk to disk, after saying what that will take."""
    from reelquant.cli import console, tables
    from reelquant.recipes.stream import quantize_folder

    if not json:
        console.out.print(tables.estimate_table(job, job.estimate()))
    with console.Bars() as bars:
        report = quantize_folder(job, output, resume=resume, force=force, progress=bars)
    return _told(report, Path(output).expanduser().resolve(), json)


def _run(
    pipe: Any, recipe: Recipe, texts: list[str] | None, exclude: list[str], call: dict[str, Any], output: Path, force: bool, json: bool
) -> dict[str, Any]:
    from reelquant import api
    from reelquant.cli import console

    with console.Bars() as bars:
        report = api.quantize(pipe, recipe, texts, skip=exclude, progress=bars, **call)
        bars.phase("write", 1)
        path = api.save(pipe, output, report, force=force)
    return _told(report, path, json)


def _told(report: Report, path: Path, json: bool) -> dict[str, Any]:
    """Print the proof, unless a document is wanted."""
    from reelquant.cli import console, tables

    for part in [] if json else tables.proof(report):
        console.out.print(part)
        console.out.print()
    if not json:
        console.out.print(f"[green]✓[/green] {path}", soft_wrap=True)
    return report.to_json() | {"output": str(path)}


def _hold_against(
    model: str, output: Path, texts: list[str] | None, gate: str, device: str, dtype: str, call: dict[str, Any]
) -> Evaluation:  # fmt: skip
    """A short evaluation of what was written: few clips, figures that need no downloaded network, no noise floor."""
    from reelquant.cli.console import Bars
    from reelquant.cli.options import torch_dtype
    from reelquant.evidence.run import Options, evaluate

    with Bars() as bars:
        options = Options(("quick",), gate=gate, device=device, progress=bars)
        return evaluate(str(output), model, texts, clips=GATE_CLIPS, floor=["none"], dtype=torch_dtype(dtype), options=options, **call)


def _finish(document: dict[str, Any], made: Evaluation | None, json: bool) -> None:
    from reelquant.cli import console
    from reelquant.cli.evaluate import finish

    if json:
        console.emit(document | ({} if made is None else {"evaluation": made.to_json()}))
    if made is not None:
        finish(made, None if json else False)
