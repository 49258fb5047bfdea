"""``reelquant quantize``: a float pipeline in, a quantized folder out, with the proof."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reelquant.cli.options import Device, Dtype, Force, Json, Model, Prompts, Steps, call_options, opened, settings
from reelquant.sites import by_component

if TYPE_CHECKING:
    from reelquant.engine.report import Report
    from reelquant.evidence.evaluation import Evaluation
    from reelquant.recipes.recipe import Recipe
    from reelquant.streaming import Job

GATE_CLIPS = 8


def quantize(
    model: Model,
    recipe: Annotated[
        list[str],
        typer.Option(
            "--recipe", "-r", help="A name from `reelquant recipes`, or a YAML file; COMPONENT=RECIPE for one component. Repeatable.",
            show_default=False,
        ),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write; must be new.", show_default=False)] = None,
    components: Annotated[
        str | None,
        typer.Option("--components", help="Which to quantize, with commas; by default all denoisers.", show_default=False),
    ] = None,
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
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="FILE:SCALE", help="Merge this adapter into the float weights first. Repeatable."),
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
    """Quantize components of a pipeline and save the whole pipeline as a stock diffusers folder.

    [bold]Examples[/bold]

    [cyan]reelquant quantize tiny-dit -r qvd-w8a8 -o out[/cyan]
    [cyan]reelquant quantize tiny-dit -r qvd-w8a8 --dry-run[/cyan]      the plan, nothing else
    [cyan]reelquant quantize Wan-AI/Wan2.1-T2V-1.3B-Diffusers -r w8a16 -o wan[/cyan]
    [cyan]reelquant quantize wan-14b -r w8a16 -o out --dtype bfloat16 --max-memory 8GB[/cyan]      never the whole model in memory
    [cyan]reelquant quantize wan-14b -r w8a16 -o out --dtype bfloat16 --max-memory 8GB --resume[/cyan]      after a crash
    [cyan]reelquant quantize wan-a14b -r transformer=qvd-w8a8 -r transformer_2=qvd-w4a8 -o out[/cyan]
    [cyan]reelquant quantize tiny-dit -r qvd-w8a8 --components transformer,text_encoder,vae -o out[/cyan]
    [cyan]reelquant quantize my-folder -r my.yaml -o out --prompts texts.txt[/cyan]
    [cyan]reelquant quantize tiny-dit -r qvd-w8a8 -o out --gate default[/cyan]
    [cyan]reelquant quantize my-folder -r w8a16 -o out --lora style.safetensors:0.8[/cyan]
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
        if lora:
            raise typer.BadParameter("it compares with the float pipeline, which lacks the adapters of --lora", param_hint="--gate")
    chosen = _chosen(recipe, settings(change or []), seed)
    texts = _texts(prompts)
    names = components.replace(" ", "").split(",") if components else None
    call = call_options(steps=steps)
    job = _job(model, chosen, names, texts, exclude or [], lora or [], dtype, device, max_memory, call, resume)
    streams = job is not None and not job.fits
    if gate is not None and streams:
        raise typer.BadParameter(
            "it holds both whole pipelines in memory, and this one does not fit; quantize without it and run `reelquant evaluate "
            f"{output or 'OUTPUT'} --reference {model} --gate {gate}` on a bigger machine",
            param_hint="--gate",
        )
    if dry_run or output is None:
        _show_plans(job or opened(model, device, dtype), chosen, names, exclude or [], device, json)
        return
    if job is not None and (resume or streams):
        document = _stream(job, output, resume, force, json)
    else:
        document = _run(opened(model, device, dtype), chosen, names, texts, exclude or [], lora or [], call, output, force, json)
    made = None if gate is None else _hold_against(model, output, texts, gate, device, dtype, call)
    _finish(document, made, json)


def _chosen(sources: list[str], changes: dict[str, Any], seed: int | None) -> Recipe | dict[str, Recipe]:
    """The recipe, or one by component."""
    parts = [by_component(source) for source in sources]
    if all(component for component, _ in parts):
        return {component: _recipe(source, changes, seed) for component, source in parts}
    if len(parts) > 1:
        raise typer.BadParameter("give one recipe, or COMPONENT=RECIPE for each", param_hint="--recipe")
    return _recipe(parts[0][1], changes, seed)


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
    model: str, recipe: Recipe | dict[str, Recipe], components: list[str] | None, texts: list[str] | None, exclude: list[str],
    lora: list[str], dtype: str, device: str, max_memory: str | None, call: dict[str, Any], resume: bool,
) -> Job | None:  # fmt: skip
    """The work, planned from headers alone; None for work that has to be done in memory."""
    from reelquant.cli.options import check_device, torch_dtype
    from reelquant.models.pipelines import locate

    kind = torch_dtype(dtype)
    locate(model)  # before the slow imports
    check_device(device)
    from reelquant._errors import CheckpointError, UnsupportedError
    from reelquant.api import folder_job

    try:
        return folder_job(model, recipe, texts, components, exclude, None, lora, kind, device, max_memory, call)
    except (CheckpointError, UnsupportedError):
        if max_memory is not None or resume:
            raise
        return None  # text encoders, VAEs, checkpoints that diffusers converts: what else is wrong, the way through memory finds, too


def _show_plans(
    source: Any, recipe: Recipe | dict[str, Recipe], components: list[str] | None, exclude: list[str], device: str, json: bool
) -> None:
    """The plans of a job and what it takes, or those for a pipeline in memory."""
    from reelquant.api import plans
    from reelquant.cli import console, tables
    from reelquant.streaming import Job

    job = source if isinstance(source, Job) else None
    made = plans(source, recipe, components=components, skip=exclude) if job is None else job.plans
    if json:
        documents = {name: tables.plan_json(one, device) for name, one in made.items()}
        takes = {} if job is None else {"estimate": tables.estimate_json(job, job.estimate())}
        console.emit((documents if len(documents) > 1 else next(iter(documents.values()))) | takes)
        return
    for one in made.values():
        console.out.print(tables.plan_table(one, device))
    if job is not None:
        console.out.print(tables.estimate_table(job, job.estimate()))
    console.out.print("[dim]dry run: nothing was changed or written[/dim]")


def _stream(job: Job, output: Path, resume: bool, force: bool, json: bool) -> dict[str, Any]:
    """Quantize from disk to disk, after saying what that will take."""
    from reelquant.checkpoint import work_folder
    from reelquant.cli import console, tables
    from reelquant.cli.errors import kept_in
    from reelquant.streaming import quantize_folder

    path = Path(output).expanduser().resolve()
    if not json:
        console.out.print(tables.estimate_table(job, job.estimate()))
    with kept_in(work_folder(path)), console.Bars() as bars:
        report = quantize_folder(job, path, resume=resume, force=force, progress=bars)
    return _told(report, path, json)


def _run(
    pipe: Any,
    recipe: Recipe | dict[str, Recipe],
    components: list[str] | None,
    texts: list[str] | None,
    exclude: list[str],
    lora: list[str],
    call: dict[str, Any],
    output: Path,
    force: bool,
    json: bool,
) -> dict[str, Any]:
    from reelquant import api
    from reelquant.cli import console

    with console.Bars() as bars:
        report = api.quantize(pipe, recipe, texts, components=components, skip=exclude, lora=lora, progress=bars, **call)
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
