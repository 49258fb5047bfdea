"""The verbs: quantize, plan, save, load, evaluate and the others. Each is a few calls into the layers below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reelquant._torch_state import stock_torch

if TYPE_CHECKING:
    import torch

    from reelquant._progress import Progress
    from reelquant.checkpoint.audit import Verified
    from reelquant.checkpoint.export import Exported
    from reelquant.engine.components import RecipeSource
    from reelquant.engine.plan import Plan
    from reelquant.engine.report import Report
    from reelquant.evidence.evaluation import Evaluation
    from reelquant.evidence.run import Options
    from reelquant.evidence.speed import Benchmark
    from reelquant.models.lora import Adapters
    from reelquant.nn import Saturation
    from reelquant.streaming import Job


@stock_torch()
def quantize(
    pipe: Any,
    recipe: RecipeSource,
    prompts: Sequence[str] | None = None,
    *,
    components: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    lora: Adapters = (),
    inputs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **call: Any,
) -> Report:
    """Quantize components of a diffusers pipeline in place; all its denoisers, if nothing else is said.

    Args:
        pipe: any diffusers pipeline with a transformer or UNet, in float.
        recipe: a name from ``reelquant recipes``, a YAML file, a mapping or a :class:`Recipe`; or one of these by component:
            ``{"transformer": "qvd-w8a8", "transformer_2": "qvd-w4a8"}``.
        prompts: calibration texts, or one text; by default the pipeline's own or general video prompts.
        components: names of the components to quantize. Text encoders and VAEs get ``w8a16`` unless ``recipe`` says otherwise.
        skip: patterns of layers that stay float, on top of the recipe's.
        overrides: dotted changes to the recipe, ``{"calibrate.steps": 10}``.
        lora: adapters to merge into the float weights first, ``{"style.safetensors": 0.8}``; see :mod:`reelquant.models.lora`.
        inputs: arguments of one real call of the denoiser by name (or of several by component), for one that cannot be probed without.
        progress: receives the progress of the run.
        call: arguments of the pipeline call during calibration (``num_inference_steps``, ``num_frames``, ``height`` ...).

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
    from reelquant.checkpoint import adopt
    from reelquant.discover.components import plain
    from reelquant.engine.components import assign, default_texts
    from reelquant.engine.run import quantize_components
    from reelquant.models.lora import merging, parse_adapters, refuse_loaded, short_names

    recipes = assign(pipe, recipe, components, overrides)
    prompts = [prompts] if isinstance(prompts, str) else prompts  # a string is a sequence of letters
    if prompts is None:
        prompts = default_texts(pipe, recipes)
    refuse_loaded(pipe)
    with merging(pipe, lora) if lora else nullcontext():
        report = quantize_components(pipe, recipes, prompts, skip=skip, inputs=inputs, progress=progress, **call)[0]
    report.adapters = short_names(parse_adapters(lora))
    for name, chosen in recipes.items():
        if hasattr(part := plain(pipe.components[name]), "save_pretrained"):
            adopt(part, chosen)
    return report


@stock_torch()
def quantize_folder(
    source: str | Path,
    output: str | Path,
    recipe: RecipeSource,
    prompts: Sequence[str] | None = None,
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
    progress: Progress | None = None,
    **call: Any,
) -> Report:
    """Quantize a pipeline's folder into another one, without ever holding the float model in memory.

    The result is that of :func:`quantize` and :func:`save`, bit by bit. A run that was stopped, also by ``kill -9`` or a full disk, is
    kept in ``<output>.partial`` and goes on with ``resume``; docs/streaming.md says what is where.

    Args:
        source: bundled name, folder or hub id of a float pipeline.
        output: the folder to write; it appears complete or not at all.
        recipe: as in :func:`quantize`, one for all denoisers or one by component.
        prompts: calibration texts; by default the pipeline's own or general video prompts.
        components: denoisers to quantize, by name; by default all.
        skip: patterns of layers that stay float, on top of the recipe's.
        overrides: dotted changes to the recipe.
        lora: adapters to merge into the float weights first, as in :func:`quantize`; all that they change must be quantized.
        dtype: of the float parts of what is quantized, float32 by default; other components are copied as they are.
        device: where layers are built and the sampler runs.
        max_memory: ``"8GB"`` or a number of bytes; by default what is free. Activations of a denoiser call come on top.
        resume: go on with an interrupted run of the same work.
        force: replace an existing folder in the end, and give up what an interrupted run left.
        progress: receives the progress of the run.
        call: arguments of the pipeline call during calibration.

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
    return streamed(job, output, resume=resume, force=force, progress=progress)


@stock_torch()
def folder_job(
    source: str | Path,
    recipe: RecipeSource,
    prompts: Sequence[str] | None,
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
    from reelquant.models.pipelines import local_folder
    from reelquant.streaming import Job, Source, free_memory, parse_bytes

    budget = free_memory() if max_memory is None else parse_bytes(max_memory)
    opened = Source.open(local_folder(source), dtype or torch.float32, device)
    opened.check_denoisers([*(components or ()), *(recipe if isinstance(recipe, Mapping) else ())])
    recipes = assign(opened.pipe, recipe, components, overrides)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    return Job.of(opened, recipes, prompts, skip, call, budget, parse_adapters(lora))


def plan(
    pipe: Any,
    recipe: RecipeSource,
    *,
    skip: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Plan:
    """What a recipe would do to the (first) denoiser of a pipeline: a row per layer, nothing is changed."""
    from reelquant.discover import denoiser_of

    name = denoiser_of(pipe)[0]
    return plans(pipe, recipe, components=[name], skip=skip, overrides=overrides, inputs=inputs)[name]


@stock_torch()
def plans(
    pipe: Any,
    recipe: RecipeSource,
    *,
    components: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, Plan]:
    """The plan of every component that :func:`quantize` would quantize with these arguments, by name."""
    from reelquant.engine.components import assign, mapping, plan_components

    return plan_components(pipe, assign(pipe, recipe, components, overrides), skip, mapping(pipe, inputs=inputs))


@stock_torch()
def configure(
    model: Any,
    *,
    kernels: str | None = None,
    temporal_table: bool | None = None,
    attention: str | Mapping[str, str] | None = None,
    runtime: str | None = None,
) -> None:
    """Change how a quantized model is computed, after it was loaded or quantized. Checkpoints do not store these settings.

    Args:
        model: a quantized model, or a pipeline, which means all its quantized parts.
        kernels: ``reference`` for plain torch, the oracle of all kernels, or ``auto`` for the fastest.
        temporal_table: whether stored outputs of temporal layers are used where they fit, or every layer is computed.
        attention: formats of the operands of attention, ``{"scores": "int8", "values": "float"}`` (or ``"e4m3"``). They are rounded
            where a kernel takes the call, except at protected steps; ``"float"`` rounds none.
        runtime: ``openvino`` runs quantized denoisers as one graph each, on CPUs; ``torch`` goes back. Other parts stay in torch.

    Raises:
        RecipeError: for an unknown name of kernels, of a runtime, or of a format of attention.
        UnsupportedError: if nothing is quantized, no table is stored, or the runtime is not installed or cannot run the model.

    Example:
        >>> pipe = reelquant.load("out")
        >>> reelquant.configure(pipe, kernels="reference")
        >>> reelquant.configure(pipe, kernels="auto", runtime="openvino")
    """
    from reelquant.graphs.configure import configure_model

    configure_model(model, dict(kernels=kernels, temporal_table=temporal_table, attention=attention, runtime=runtime))


@stock_torch()
def open_pipeline(model: str | Path, **options: Any) -> Any:
    """Open a float or quantized pipeline by bundled name, folder or hub id; see :func:`reelquant.models.pipelines.open_pipeline`."""
    from reelquant.models.pipelines import open_pipeline as opened

    return opened(model, **options)


@stock_torch()
def save(pipe: Any, folder: str | Path, report: Report | None = None, *, force: bool = False, **options: Any) -> Path:
    """Write a pipeline as a stock diffusers folder, complete or not at all; see :func:`reelquant.checkpoint.save`."""
    from reelquant.checkpoint import save as written

    return written(pipe, folder, report, force=force, **options)


def load(folder: str | Path, **options: Any) -> Any:
    """Open what :func:`save` wrote: :func:`open_pipeline` with ``dtype`` and ``device``, every layer checked against its checksum."""
    return open_pipeline(folder, **options)


@contextmanager
def saturation(model: Any) -> Iterator[Saturation]:
    """Inside, count how much of their inputs the quantized layers of a pipeline or module clip. Nothing is counted, or slower, outside.

    Args:
        model: a quantized pipeline, or its denoiser.

    Example:
        >>> with reelquant.saturation(pipe) as seen:
        ...     pipe("a red circle moving left")
        >>> seen.excess, next(iter(seen.by_layer.items())), seen.by_step[0].share, seen.sentence()
    """
    from torch import nn

    from reelquant.discover import denoiser_of
    from reelquant.nn import Saturation

    denoiser = model if isinstance(model, nn.Module) else denoiser_of(model)[1]
    with Saturation().counting(denoiser) as seen:
        yield seen


def verify(folder: str | Path, *, renew: bool = False) -> Verified:
    """Compare every byte of a saved folder with what was written, without loading it; see :mod:`reelquant.checkpoint.audit`.

    Args:
        folder: of a pipeline.
        renew: take the files as they are, after they were changed on purpose.

    Raises:
        CheckpointError: naming the first file or layer that is not what was written.
    """
    from reelquant.checkpoint.audit import verify_folder

    return verify_folder(folder, renew=renew)


@stock_torch()
def export(folder: str | Path, format: str, output: str | Path, **options: Any) -> Exported:
    """Write a saved folder for another project: ``comfyui``, ``gguf`` or ``torchao``; see :func:`reelquant.checkpoint.export.export`.

    Example:
        >>> made = reelquant.export("out", "gguf", "model.gguf")
        >>> made.of("requantized"), made.left_behind
    """
    from reelquant.checkpoint.export import export as written

    return written(folder, format, output, **options)


@stock_torch()
def evaluate(
    test: Any,
    reference: Any,
    prompts: Sequence[str] | None = None,
    *,
    clips: int = 16,
    metrics: Sequence[str] | str = "default",
    floor: Sequence[str] | None = None,
    grain_steps: Sequence[int] = (),
    gate: str | None = None,
    fail_under: Mapping[str, float] | None = None,
    output: str | Path | None = None,
    weights: str | Path | None = None,
    data: str | Path | None = None,
    reuse: str | Path | None = None,
    fid_frames: int = 0,
    clip_model: str | None = None,
    seed: int = 50_000,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    **call: Any,
) -> Evaluation:
    """Sample a quantized pipeline and its float original from the same texts and noise, and measure what quantization changed.

    Args:
        test: the quantized pipeline: a folder, or a pipeline in memory.
        reference: the float pipeline: bundled name, folder, hub id, or a pipeline in memory.
        prompts: one text per clip, repeated to fill; by default captions of their world for bundled pipelines, else bundled video prompts.
        clips: how many are sampled of each variant; 256 and more for FVD, FID and KID.
        metrics: names or groups (``quick``, ``default``, ``all``); docs/metrics.md defines them.
        floor: float runs that show the noise floor: ``bf16``, ``float32``, ``compiled``, ``reseed``; ``["none"]`` for none. By default the
            other precision, and other noise if sets of clips are compared.
        grain_steps: sample a few flat scenes at these numbers of denoising steps too: does noise in flat areas grow with them?
        gate: ``strict``, ``default`` or ``loose``; the verdict is in the result, nothing is raised.
        fail_under: limits on top, ``{"psnr": 30}``: a figure must not be worse.
        output: folder for clips, report.html, report.json and summary.md; without it nothing is kept.
        weights: folder with networks; else the user's cache.
        data: folder of real clips, for distances to data.
        reuse: folder of another evaluation of the same float pipeline, texts, noise and call, whose float clips are taken over.
        fid_frames: frames of a clip that FID and KID look at, evenly spaced; 0 for all.
        clip_model: CLIP for text metrics, a folder or hub id that transformers loads.
        seed: noise of the first clip; clip ``i`` starts from ``seed + i``.
        batch: clips per pipeline call.
        dtype: of the float parts, float32 by default.
        device: where the pipelines and networks run.
        resume, force: go on with the evaluation in ``output``, or replace it.
        progress: receives the progress of the run.
        call: arguments of the pipeline call (``num_inference_steps``, ``num_frames``, ``height`` ...).

    Returns:
        Figures with intervals beside the noise floor, the verdict of the gate, everything as JSON.

    Raises:
        ReelQuantError: one sentence on what is wrong and what would work; NaN, black or constant clips stop a run as soon as they are seen.

    Example:
        >>> found = reelquant.evaluate("out", "tiny-dit", clips=64, gate="default", output="proof")
        >>> found["psnr"], found.passed
    """
    import torch

    from reelquant.evidence import run

    folders = dict(output=output, weights=weights, data=data, reuse=reuse)
    settings = dict(gate=gate, fail_under=fail_under, fid_frames=fid_frames, clip_model=clip_model, progress=progress)
    options = _options(metrics, folders, device=device, resume=resume, force=force, **settings)
    return run.evaluate(
        test,
        reference,
        prompts,
        clips=clips,
        seed=seed,
        floor=floor,
        grain_steps=grain_steps,
        batch=batch,
        dtype=dtype or torch.float32,
        options=options,
        **call,
    )


@stock_torch()
def compare(
    reference: str | Path,
    test: str | Path,
    prompts: Mapping[str, str] | None = None,
    *,
    metrics: Sequence[str] | str = "default",
    gate: str | None = None,
    fail_under: Mapping[str, float] | None = None,
    output: str | Path | None = None,
    weights: str | Path | None = None,
    data: str | Path | None = None,
    clip_model: str | None = None,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a folder of clips against another one; clips of equal names belong together.

    Args:
        reference: folder of clips: mp4, gif, webm, mov, mkv, avi, or PNG frames.
        test: folder of clips under test.
        prompts: text by clip name, for text metrics.
        metrics, gate, fail_under, output, weights, data, clip_model, device, resume, force, progress: as in :func:`evaluate`.

    Raises:
        ReelQuantError: if a folder holds no clip, a file is broken, or a pair differs in size.
    """
    from reelquant.evidence import run

    folders = dict(output=output, weights=weights, data=data)
    settings = dict(gate=gate, fail_under=fail_under, clip_model=clip_model, progress=progress)
    options = _options(metrics, folders, device=device, resume=resume, force=force, **settings)
    return run.compare(reference, test, prompts, options=options)


@stock_torch()
def benchmark(test: str | Path, reference: str | Path, **options: Any) -> Benchmark:
    """Time a quantized pipeline against its float original on this machine, in turns; see :func:`reelquant.evidence.speed.benchmark`.

    Example:
        >>> found = reelquant.benchmark("out", "tiny-dit", rounds=5, num_inference_steps=10)
        >>> found.speedup.median, found.peak_bytes
    """
    from reelquant.evidence.speed import benchmark as measured

    return measured(str(test), str(reference), **options)


def _options(metrics: Sequence[str] | str, folders: Mapping[str, str | Path | None], **settings: Any) -> Options:
    """Options of an evaluation; None leaves the default."""
    from reelquant.evidence.run import Options

    names = [metrics] if isinstance(metrics, str) else metrics
    paths = {name: Path(folder) for name, folder in folders.items() if folder is not None}
    return Options(names, **paths, **{name: value for name, value in settings.items() if value is not None})
