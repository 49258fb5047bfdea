"""``reelquant quantize``: a float pipeline in, a quantized folder out, with the proof."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reelquant.cli.options import (
    GATES,
    NEW_FOLDER,
    Device,
    Dtype,
    Force,
    Frames,
    Guidance,
    Height,
    Json,
    Model,
    Prompts,
    Steps,
    Variant,
    Width,
    call_options,
    conditions,
    more_help,
    recipe_names,
    seed_within_bounds,
    settings,
)
from reelquant.cli.publish import Push, upload
from reelquant.cli.request import Request, stream
from reelquant.cli.signals import keeping
from reelquant.ranks import this_rank
from reelquant.sites import by_component

if TYPE_CHECKING:
    from reelquant.engine.report import Report
    from reelquant.evidence.evaluation import Evaluation
    from reelquant.recipes.recipe import Recipe
    from reelquant.streaming import Job

NOTHING_KEPT = "nothing is left behind: begin with --resume, and what is done by then is kept"

Recipes = Annotated[
    list[str],
    typer.Option(
        "--recipe",
        "-r",
        help="A name from `reelquant recipes`, or a YAML file; COMPONENT=RECIPE for one component. Repeatable.",
        show_default=False,
        autocompletion=recipe_names,
    ),
]
Components = Annotated[
    str | None,
    typer.Option(
        "--components",
        "--component",
        help="Which to quantize, with commas: transformer, transformer_2, controlnet, text_encoder, image_encoder, vae ... "
        "By default all denoisers.",
        show_default=False,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", callback=seed_within_bounds, help="Seed of the first calibration clip.", show_default=False),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        "--skip",
        metavar="PATTERN",
        help="Keep these layers float: a name, glob, re:REGEX or role:ROLE. Repeatable.",
        show_default=False,
    ),
]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", hidden=True)]  # what --skip was called in version 0.1
Change = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: calibrate.prompts=8. Repeatable."),
]
Lora = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE:SCALE", help="Merge this adapter into the float weights first. Repeatable."),
]
Gate = Annotated[
    str | None,
    typer.Option(
        "--gate",
        help="Then compare 8 clips with float: strict, default or loose; exit code 1 if a limit is missed.",
        autocompletion=GATES,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="8GB, 500MB: a model that does not fit is streamed. Default: free memory.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue an interrupted run, or start if there is nothing to continue."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print what every layer would become and what the work takes, then stop."),
]


@dataclass(frozen=True)
class Delivery:
    """What happens with the result.

    Attributes:
        output: folder to write; None for a dry run.
        gate: preset to evaluate against, or None.
        resume: continue an interrupted run.
        dry_run: only print the plan.
        force: replace an existing folder.
        json: print one JSON document instead of tables.
        repository: of the hub, to upload the folder to; None for no upload.
    """

    output: Path | None
    gate: str | None
    resume: bool
    dry_run: bool
    force: bool
    json: bool
    repository: str | None = None


@more_help("""
    [bold]Examples[/bold]

    [cyan]reelquant quantize tiny-dit -r qvd-w8a8 -o out[/cyan]
    [cyan]reelquant quantize tiny-dit -r qvd-w8a8 --dry-run[/cyan]      the plan, nothing else
    [cyan]reelquant quantize Wan-AI/Wan2.1-T2V-1.3B-Diffusers -r w8a16 -o wan[/cyan]
    [cyan]reelquant quantize wan-14b -r w8a16 -o out --max-memory 8GB[/cyan]      the whole model is never in memory
    [cyan]reelquant quantize wan-14b -r w8a16 -o out --max-memory 8GB --resume[/cyan]
    [cyan]reelquant quantize wan-a14b -r transformer=qvd-w8a8 -r transformer_2=qvd-w4a8 -o out[/cyan]
    [cyan]reelquant quantize tiny-dit -r qvd-w8a8 --components transformer,text_encoder,vae -o out[/cyan]
    [cyan]reelquant quantize my-folder -r my.yaml -o out --prompts texts.txt[/cyan]
    [cyan]reelquant quantize wan-i2v -r qvd-w8a8 -o out --conditions clips.jsonl[/cyan]      {"prompt": "a dog runs", "image": "dog.png"}
    [cyan]reelquant quantize svd -r qvd-w8a8 -o out --conditions pictures/ --frames 14[/cyan]
    [cyan]reelquant quantize tiny-dit -r qvd-w8a8 -o out --gate default[/cyan]
    [cyan]reelquant quantize wan.safetensors@wan-folder -r w8a16 -o out[/cyan]      the denoiser from one file; .gguf, too
    [cyan]reelquant quantize my-folder -r w8a16 -o out --push-to-hub me/my-w8a16[/cyan]      with a model card
    [cyan]reelquant quantize my-folder -r w8a16 -o out --lora style.safetensors:0.8[/cyan]
    [cyan]reelquant quantize tiny-unet -r qvd-w4a8 -o out --skip down_blocks.0 --set search.scope=family[/cyan]

    Afterwards [cyan]reelquant generate out -p "..." -o clip.mp4[/cyan], or in Python
    [cyan]import reelquant; DiffusionPipeline.from_pretrained("out")[/cyan].
""")
def quantize(
    model: Model,
    recipe: Recipes,
    output: Annotated[Path | None, NEW_FOLDER] = None,
    components: Components = None,
    prompts: Prompts = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    seed: Seed = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    variant: Variant = None,
    skip: Skip = None,
    exclude: Exclude = None,
    change: Change = None,
    lora: Lora = None,
    gate: Gate = None,
    push: Push = None,
    max_memory: MaxMemory = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Quantize components of a pipeline and save the whole pipeline as a stock diffusers folder."""
    delivery = Delivery(output, gate, resume, dry_run, force, json, push)
    _check(delivery, model, lora or [])
    chosen = _chosen(recipe, settings(change or []), seed)
    of_clips = dict(prompts=prompts, seed=seed, steps=steps, frames=frames, height=height, width=width, guidance=guidance)
    if gate is None and not dry_run and components is None:
        _refuse_idle(chosen, [f"--{name}" for name, value in of_clips.items() if value is not None])
    request = Request(
        model=model,
        recipe=chosen,
        components=components.replace(" ", "").split(",") if components else None,
        prompts=conditions(prompts),
        skip=[*(skip or []), *(exclude or [])],
        lora=lora or [],
        dtype=dtype,
        variant=variant,
        device=device,
        max_memory=max_memory,
        call=call_options(steps=steps, frames=frames, height=height, width=width, guidance=guidance),
    )
    with keeping(lambda: "" if dry_run else NOTHING_KEPT):
        _run(request, delivery)


def _check(delivery: Delivery, model: str, lora: list[str]) -> None:
    """Refuse combinations of options before anything slow begins."""
    if delivery.output is None and not delivery.dry_run:
        raise typer.BadParameter("say where to write (or try --dry-run)", param_hint="--output")
    if delivery.output is not None and not delivery.dry_run:
        from reelquant.checkpoint import check_target, check_writable, refuse_source

        refuse_source(delivery.output, model)
        check_target(delivery.output, force=delivery.force)
        check_writable(delivery.output)
    if delivery.repository is not None and not delivery.dry_run:
        from reelquant.checkpoint.hub import check_hub

        check_hub(delivery.repository)
    if delivery.gate is not None:
        from reelquant.evidence.gate import check_preset

        check_preset(delivery.gate)
        if lora:
            message = "it compares with the float pipeline, which lacks the adapters of --lora"
            raise typer.BadParameter(message, param_hint="--gate")


def _refuse_idle(recipe: Recipe | dict[str, Recipe], options: list[str]) -> None:
    """Refuse options of clips where no clip is made: who gives them expects calibration.

    Raises:
        RecipeError: naming the first of them.
    """
    from reelquant._errors import RecipeError

    chosen = list(recipe.values()) if isinstance(recipe, dict) else [recipe]
    if options and all(one.data_free for one in chosen):
        names = ", ".join(dict.fromkeys(one.name for one in chosen))
        raise RecipeError(
            f"{options[0]} says nothing here: {names} needs no data and no clip is made; leave it out, add --gate, "
            "or choose a recipe that calibrates (`reelquant recipes` lists which need data)"
        )


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

    recipe = load_recipe(source, changes)
    return recipe if seed is None or recipe.data_free else load_recipe(recipe, {"calibrate.seed": seed})


def _run(request: Request, delivery: Delivery) -> None:
    """Plan, then stream or quantize in memory, then evaluate if a gate was asked for."""
    rank = this_rank()
    if not rank.first and (delivery.dry_run or request.data_free):
        return  # nothing is sampled, and the first process does it all
    if not rank.alone and not delivery.dry_run and not request.data_free:
        _run_shared(request, delivery)
        return
    job = request.job(streaming=delivery.resume)
    streams = job is not None and not job.fits
    if job is not None and streams:
        job.check()
    if delivery.gate is not None and streams:
        raise typer.BadParameter(_too_large(request, delivery), param_hint="--gate")
    if delivery.dry_run or delivery.output is None:
        _show_plans(request, job, delivery.json)
        return
    if job is not None and (delivery.resume or streams):
        if not delivery.json:
            _show_estimate(job)
        report, path = stream(job, delivery.output, resume=delivery.resume, force=delivery.force)
    else:
        report, path = request.run(delivery.output, force=delivery.force)
    _deliver(request, delivery, report, path)


def _deliver(request: Request, delivery: Delivery, report: Report, path: Path) -> None:
    """Show what was done, and evaluate it if a gate was asked for."""
    assert delivery.output is not None
    _show_proof(report, path, delivery.json)
    with keeping(lambda: f"'{path}' is complete: go on with `{_compared(request, delivery)}`"):
        evaluation = None if delivery.gate is None else request.evaluate(delivery.output, delivery.gate)
    uploaded = upload(path, delivery.repository, delivery.json) if evaluation is None or evaluation.passed else {}
    _finish(report.to_json() | {"output": str(path)} | uploaded, evaluation, delivery.json)


def _run_shared(request: Request, delivery: Delivery) -> None:
    """Sample together with the other processes; the first one writes, shows and evaluates."""
    if delivery.resume or request.max_memory is not None:
        option = "--resume" if delivery.resume else "--max-memory"
        message = "several processes sample with a pipeline that each holds in memory; leave it out, or start one process"
        raise typer.BadParameter(message, param_hint=option)
    assert delivery.output is not None
    report, path = request.run(delivery.output, force=delivery.force)
    if this_rank().first:
        _deliver(request, delivery, report, path)


def _too_large(request: Request, delivery: Delivery) -> str:
    command = _compared(request, delivery)
    return (
        f"it holds both whole pipelines in memory, and this one does not fit; quantize without it and run `{command}` on a bigger machine"
    )


def _compared(request: Request, delivery: Delivery) -> str:
    """The command that compares the result with the float pipeline."""
    return f"reelquant evaluate {delivery.output or 'OUTPUT'} --reference {request.model} --gate {delivery.gate}"


# ----------------------------------------------------------------------------------------------------------- output


def _show_plans(request: Request, job: Job | None, json: bool) -> None:
    """The plan of every component and, if the model could be planned from disk, what the work takes."""
    from reelquant.cli import console, tables

    plans = request.plans() if job is None else job.plans
    if json:
        documents = {name: tables.plan_json(plan, request.device) for name, plan in plans.items()}
        takes = {} if job is None else {"estimate": tables.estimate_json(job, job.estimate())}
        console.emit((documents if len(documents) > 1 else next(iter(documents.values()))) | takes)
        return
    for plan in plans.values():
        console.out.print(tables.plan_table(plan))
        if plan.entries:
            console.out.print(tables.stages_table(plan, request.device))
    if job is not None:
        _show_estimate(job)
    console.out.print("[dim]dry run: nothing was changed or written[/dim]")


def _show_estimate(job: Job) -> None:
    from reelquant.cli import console, tables

    console.out.print(tables.estimate_table(job, job.estimate()))


def _show_proof(report: Report, path: Path, json: bool) -> None:
    """Print what was done and how well, unless a JSON document is wanted."""
    from reelquant.cli import console, tables

    if json:
        return
    for part in tables.proof(report):
        console.out.print(part)
        console.out.print()
    console.done(path)


def _finish(document: dict[str, Any], evaluation: Evaluation | None, json: bool) -> None:
    from reelquant.cli import console
    from reelquant.cli.evaluate import finish

    if json:
        console.emit(document | ({} if evaluation is None else {"evaluation": evaluation.to_json()}))
    if evaluation is not None:
        finish(evaluation, None if json else False)
