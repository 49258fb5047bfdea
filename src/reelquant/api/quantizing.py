"""From a float pipeline to a quantized one, in memory or from disk to disk. Each verb is a few calls into the layers below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reelquant._remarks import remarks
from reelquant.api.asked import in_memory, on_disk, verb

if TYPE_CHECKING:
    import torch

    from reelquant._progress import Progress
    from reelquant.engine.components import RecipeSource
    from reelquant.engine.plan import Plan
    from reelquant.engine.report import Report
    from reelquant.models.condition import Condition, Prompts
    from reelquant.models.lora import Adapters
    from reelquant.recipes.recipe import Recipe
    from reelquant.streaming import Job


@verb(in_memory)
def quantize(
    pipe: Any,
    recipe: RecipeSource,
    prompts: Prompts | None = None,
    *,
    components: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    lora: Adapters = (),
    inputs: Mapping[str, Any] | None = None,
    shared: str | Path | None = None,
    force: bool = False,
    progress: Progress | Literal[False] | None = None,
    **call: Any,
) -> Report:
    """Quantize components of a diffusers pipeline in place; all its denoisers, if nothing else is said.

    Args:
        pipe: any diffusers pipeline with a transformer or UNet, in float, or a :class:`reelquant.Denoiser`.
        recipe: a name from ``reelquant recipes``, a YAML file, a mapping or a :class:`Recipe`; or one of these by component:
            ``{"transformer": "qvd-w8a8", "transformer_2": "qvd-w4a8"}``.
        prompts: calibration texts, or one text, or conditions (:func:`reelquant.read_conditions`); by default the pipeline's own or general
            video prompts; none where it takes none.
        components: names of the components to quantize. Text encoders and VAEs get ``w8a16`` unless ``recipe`` says otherwise.
        skip: patterns of layers that stay float, on top of the recipe's.
        overrides: dotted changes to the recipe, ``{"calibrate.steps": 10}``.
        lora: adapters to merge into the float weights first, ``{"style.safetensors": 0.8}``; see :mod:`reelquant.models.lora`.
        inputs: arguments of one real call of the denoiser by name (or of several by component), for one that cannot be probed without.
        shared: a folder in which the processes that torchrun, ``accelerate launch`` or ``srun`` started share the sampling; all make the
            same call, and all get the same pipeline. A run that was stopped goes on from it; delete it when the result is saved.
            docs/ranks.md says what is shared.
        force: give up what ``shared`` holds of other work.
        progress: hears how far the run is; by default bars in a terminal or a notebook, False for none.
        call: arguments of the pipeline call during calibration (``num_inference_steps``, ``num_frames``, ``height`` ...), and conditions
            (``image``, ``video``, ``class_labels`` ...): one for every clip, or a list with one per clip.

    Returns:
        A report with sizes, errors and reasons; its ``parts`` are those of the components, if there are several.

    Raises:
        ReelQuantError: one sentence on what is wrong and what would work; the pipeline is as it was.

    Example:
        >>> import reelquant
        >>> pipe = reelquant.open_pipeline("tiny-dit")
        >>> report = reelquant.quantize(pipe, "qvd-w8a8", components=["transformer", "text_encoder", "vae"])
        >>> reelquant.save(pipe, "out", report)
    """
    from reelquant.checkpoint import adopt, adopt_module
    from reelquant.discover.components import plain
    from reelquant.engine.components import assign, default_texts
    from reelquant.engine.run import quantize_components
    from reelquant.models.lora import merging, parse_adapters, refuse_loaded, short_names
    from reelquant.models.origin import origin_of

    recipes = assign(pipe, recipe, components, overrides)
    prompts = [prompts] if isinstance(prompts, str) else prompts  # a string is a sequence of letters
    if prompts is None:
        prompts = default_texts(pipe, recipes, call)
    refuse_loaded(pipe)
    source = origin_of(pipe)
    how = {"skip": skip, "inputs": inputs, "progress": progress or None, **call}
    with (
        remarks() as told,
        merging(pipe, lora) if lora else nullcontext(),
        _shared(pipe, recipes, prompts, skip, call, shared, force) as own,
    ):
        report = quantize_components(pipe, recipes, prompts, **own, **how)[0]
    report.warnings += told
    report.adapters, report.source = short_names(parse_adapters(lora)), source
    for name, chosen in recipes.items():
        part = plain(pipe.components[name])
        if hasattr(part, "save_pretrained"):
            adopt(part, chosen)
        else:
            adopt_module(part, chosen)
    return report


@contextmanager
def _shared(
    pipe: Any, recipes: Mapping[str, Recipe], prompts: Any, skip: Sequence[str], call: Mapping[str, Any], folder: Any, force: bool
) -> Iterator[dict[str, Any]]:
    """Arguments for :func:`reelquant.engine.run.quantize_components` that let processes share the sampling; none without a folder."""
    from reelquant.models.described import described
    from reelquant.streaming import sharing

    if folder is None:
        yield {}
        return
    facts = {
        "recipe": {name: recipe.digest() for name, recipe in recipes.items()},
        "skip": list(skip),
        "prompts": described(prompts),
        "call": described(dict(call)),
    }
    with sharing(Path(folder).absolute(), pipe, facts, force=force) as pool:
        yield {"store_of": pool.store}


@verb(on_disk)
def quantize_folder(
    source: str | Path,
    output: str | Path,
    recipe: RecipeSource,
    prompts: Prompts | None = None,
    *,
    components: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    lora: Adapters = (),
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    max_memory: int | str | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | Literal[False] | None = None,
    **call: Any,
) -> Report:
    """Quantize a pipeline's folder into another one, without ever holding the float model in memory.

    The result is that of :func:`quantize` and :func:`save`, bit by bit. A run that was stopped, also by ``kill -9`` or a full disk, is
    kept in ``<output>.partial`` and goes on with ``resume``; docs/streaming.md says what is where.

    Args:
        source: bundled name, folder or hub id of a float pipeline.
        output: the folder to write; it appears complete or not at all.
        recipe: as in :func:`quantize`, one for all denoisers or one by component.
        prompts: calibration texts or conditions; by default the pipeline's own or general video prompts.
        components: denoisers to quantize, by name; by default all.
        skip: patterns of layers that stay float, on top of the recipe's.
        overrides: dotted changes to the recipe.
        lora: adapters to merge into the float weights first, as in :func:`quantize`; all that they change must be quantized.
        dtype: of the float parts of what is quantized, float32 by default; other components are copied as they are.
        device: where layers are built and the sampler runs.
        max_memory: ``"8GB"`` or a number of bytes; by default what is free. Activations of a denoiser call come on top.
        resume: go on with an interrupted run of the same work.
        force: replace an existing folder in the end, and give up what an interrupted run left.
        progress: hears how far the run is; by default bars in a terminal or a notebook, False for none.
        call: arguments of the pipeline call during calibration, conditions among them.

    Returns:
        As :func:`quantize`.

    Raises:
        ReelQuantError: one sentence on what is wrong and what would work; text encoders, VAEs and ``temporal: table`` need a pipeline in
            memory.

    Example:
        >>> reelquant.quantize_folder("wan-14b", "wan-14b-w8a16", "w8a16", dtype=torch.bfloat16, max_memory="8GB")
    """
    from reelquant.streaming import quantize_folder as streamed

    job = folder_job(source, recipe, prompts, components, skip, overrides, lora, dtype, device, max_memory, call)
    return streamed(job, output, resume=resume, force=force, progress=progress or None)


@verb(on_disk)
def folder_job(
    source: str | Path,
    recipe: RecipeSource,
    prompts: Prompts | None,
    components: Sequence[str] | None,
    skip: Sequence[str],
    overrides: dict[str, Any] | None,
    lora: Adapters,
    dtype: torch.dtype | None,
    device: str,
    max_memory: int | str | None,
    call: Mapping[str, Any],
) -> Job:
    """The work of :func:`quantize_folder`, planned but not begun: its ``plans`` and :meth:`~reelquant.streaming.Job.estimate`."""
    import torch

    from reelquant.engine.components import assign
    from reelquant.models.lora import parse_adapters
    from reelquant.streaming import Job, Source, free_memory, parse_bytes

    budget = free_memory() if max_memory is None else parse_bytes(max_memory)
    opened = Source.open(source, dtype or torch.float32, device)
    opened.check_denoisers([*(components or ()), *(recipe if isinstance(recipe, Mapping) else ())])
    recipes = assign(opened.pipe, recipe, components, overrides)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    return Job.of(opened, recipes, prompts, skip, call, budget, parse_adapters(lora))


def read_conditions(path: str | Path) -> list[Condition]:
    """What a file or folder says clips are made from, for ``prompts`` of all verbs; see :func:`reelquant.models.prompts.load_conditions`.

    Example:
        >>> reelquant.quantize(pipe, "qvd-w8a8", reelquant.read_conditions("clips.jsonl"))
    """
    from reelquant.models.prompts import load_conditions

    return load_conditions(path)


@verb(in_memory)
def plan(
    pipe: Any,
    recipe: RecipeSource,
    *,
    skip: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    **call: Any,
) -> Plan:
    """What a recipe would do to the (first) denoiser of a pipeline: a row per layer. Nothing is changed."""
    from reelquant.discover import denoiser_of

    name = denoiser_of(pipe)[0]
    return plans(pipe, recipe, components=[name], skip=skip, overrides=overrides, inputs=inputs, **call)[name]


@verb(in_memory)
def plans(
    pipe: Any,
    recipe: RecipeSource,
    *,
    components: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    **call: Any,
) -> dict[str, Plan]:
    """The plan of every component that :func:`quantize` would quantize with these arguments, by name."""
    from reelquant.engine.components import assign, mapping, plan_components

    return plan_components(pipe, assign(pipe, recipe, components, overrides), skip, mapping(pipe, inputs=inputs, call=call))
