"""What quantization changed and gained: evaluate, compare, benchmark, saturation. Each verb is a few calls into the layers below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reelquant.api.asked import anywhere, check_sides, clips_on_disk, each_anywhere, model_in_memory, on_disk, verb

if TYPE_CHECKING:
    import torch

    from reelquant._progress import Progress
    from reelquant.evidence.evaluation import Evaluation
    from reelquant.evidence.run import Options
    from reelquant.evidence.several import Evaluations
    from reelquant.evidence.speed import Benchmark
    from reelquant.models.condition import Condition, Prompts
    from reelquant.nn import Saturation


@verb(anywhere)
def evaluate(
    test: Any,
    reference: Any = None,
    prompts: Prompts | None = None,
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
    sensitivity: str | Path | None = None,
    fid_frames: int = 0,
    clip_model: str | None = None,
    speed: bool = False,
    seed: int = 50_000,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    shared: bool = False,
    progress: Progress | Literal[False] | None = None,
    **call: Any,
) -> Evaluation | None:
    """Sample a quantized pipeline and its float original from the same texts and noise, and measure what quantization changed.

    Args:
        test: the quantized pipeline: a folder, or a pipeline in memory.
        reference: the float pipeline: bundled name, folder, hub id, or a pipeline in memory; by default the one that ``test`` was
            quantized from, by its report.
        prompts: one text or condition (:func:`reelquant.read_conditions`) per clip, repeated to fill; by default captions of their world
            for bundled pipelines, else bundled video prompts.
        clips: how many are sampled of each variant; 256 and more for FVD, FID and KID.
        metrics: names or groups (``quick``, ``default``, ``all``); docs/metrics.md defines them.
        floor: float runs that show the noise floor: ``bf16``, ``rounded``, ``float32``, ``compiled``, ``reseed``; ``["none"]`` for none.
            By default the other precision (numbers rounded to it on processors without bfloat16, where it would take many times as long
            as the float clips), and other noise if sets of clips are compared.
        grain_steps: sample a few flat scenes at these numbers of denoising steps too: does noise in flat areas grow with them?
        gate: ``strict``, ``default`` or ``loose``; the verdict is in the result, nothing is raised.
        fail_under: limits on top, ``{"psnr": 30}``: a figure must not be worse.
        output: folder for clips, report.html, report.json and summary.md; without it nothing is kept.
        weights: folder with networks; else the user's cache.
        data: folder of real clips, for distances to data.
        reuse: folder of another evaluation of the same float pipeline, texts, noise and call, whose float clips are taken over.
        sensitivity: folder of :func:`sensitivity`, to draw its map into the report beside what every layer got.
        fid_frames: frames of a clip that FID and KID look at, evenly spaced; 0 for all.
        clip_model: CLIP for text metrics, a folder or hub id that transformers loads.
        speed: also time both pipelines in turns and measure their peak memory, as :func:`benchmark`; they must be on disk.
        seed: noise of the first clip; clip ``i`` starts from ``seed + i``.
        batch: clips per pipeline call.
        dtype: of the float parts, float32 by default.
        variant: of the reference's weight files, ``fp16``, if it has several.
        device: where the pipelines and networks run.
        resume: go on with the evaluation in ``output``.
        force: replace the evaluation in ``output``.
        shared: the processes that torchrun, ``accelerate launch`` or ``srun`` started share the clips, in ``output``; see docs/ranks.md.
        progress: hears how far the run is; by default bars in a terminal or a notebook, False for none.
        call: arguments of the pipeline call (``num_inference_steps``, ``num_frames``, ``height`` ...), and conditions (``image`` ...),
            as in :func:`quantize`.

    Returns:
        Figures with intervals beside the noise floor, the verdict of the gate, everything as JSON. Where processes share the clips, None in
        all but the first.

    Raises:
        ReelQuantError: one sentence on what is wrong and what would work; NaN, black or constant clips stop a run as soon as they are seen.

    Example:
        >>> found = reelquant.evaluate("out", "tiny-dit", clips=64, gate="default", output="proof")
        >>> found["psnr"], found.passed
    """
    import torch

    from reelquant.evidence import run
    from reelquant.models.origin import float_original

    reference = float_original(test) if reference is None else reference
    check_sides("evaluate", {"reference": reference})
    folders = dict(output=output, weights=weights, data=data, reuse=reuse, sensitivity=sensitivity)
    settings = dict(gate=gate, fail_under=fail_under, fid_frames=fid_frames, clip_model=clip_model, progress=progress)
    settings |= dict(speed=speed, shared=shared)
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
        files=variant,
        options=options,
        **call,
    )


@verb(each_anywhere)
def evaluate_several(
    tests: Sequence[Any],
    reference: Any = None,
    prompts: Prompts | None = None,
    *,
    clips: int = 16,
    metrics: Sequence[str] | str = "default",
    floor: Sequence[str] | None = None,
    gate: str | None = None,
    fail_under: Mapping[str, float] | None = None,
    output: str | Path | None = None,
    weights: str | Path | None = None,
    data: str | Path | None = None,
    reuse: str | Path | None = None,
    fid_frames: int = 0,
    clip_model: str | None = None,
    speed: bool = False,
    seed: int = 50_000,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    progress: Progress | Literal[False] | None = None,
    **call: Any,
) -> Evaluations:
    """Evaluate several quantized pipelines of one float pipeline, whose clips are sampled once, and put them on one page.

    Args:
        tests: the quantized pipelines: folders, or pipelines in memory.
        reference: the float pipeline; by default the one that the first test was quantized from.
        output: folder for a folder of each test, as :func:`evaluate` writes it, and for report.html, report.json and summary.md of all.
        prompts, clips, metrics, floor, gate, fail_under, weights, data, reuse, fid_frames, clip_model, speed, seed, batch, dtype, variant,
            device, resume, force, progress, call: as for :func:`evaluate`.

    Returns:
        An evaluation for every test, by the name of its folder, and the data of the page.

    Raises:
        ReelQuantError: one sentence on what is wrong and what would work; every pair is looked at before anything is sampled.

    Example:
        >>> found = reelquant.evaluate_several(["w8a8", "w4a8"], "tiny-dit", clips=16, output="recipes")
        >>> {name: made["psnr"] for name, made in found.tests.items()}
    """
    import torch

    from reelquant.evidence import several
    from reelquant.models.origin import float_original

    reference = float_original(tests[0]) if reference is None else reference
    check_sides("evaluate_several", {"reference": reference})
    folders = dict(output=output, weights=weights, data=data, reuse=reuse)
    settings = dict(gate=gate, fail_under=fail_under, fid_frames=fid_frames, clip_model=clip_model, speed=speed, progress=progress)
    options = _options(metrics, folders, device=device, resume=resume, force=force, **settings)
    how = dict(clips=clips, seed=seed, floor=floor, batch=batch, dtype=dtype or torch.float32, files=variant)
    return several.evaluate_several(tests, reference, prompts, options=options, **how, **call)


@verb(clips_on_disk)
def compare(
    test: str | Path,
    reference: str | Path,
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
    progress: Progress | Literal[False] | None = None,
) -> Evaluation:
    """Measure a folder of clips against another one; clips of equal names belong together.

    Args:
        test: folder of clips under test: mp4, gif, webm, mov, mkv, avi, or PNG frames.
        reference: folder of clips to compare with.
        prompts: text by clip name, for text metrics.
        metrics: names or groups, as in :func:`evaluate`, and so are all that follow.
        gate: ``strict``, ``default`` or ``loose``.
        fail_under: limits on top, ``{"psnr": 30}``.
        output: folder for the report; without it nothing is kept.
        weights: folder with networks; else the user's cache.
        data: folder of real clips, for distances to data.
        clip_model: CLIP for text metrics, a folder or hub id that transformers loads.
        device: where the networks run.
        resume: go on with the comparison in ``output``.
        force: replace the comparison in ``output``.
        progress: hears how far the run is; by default bars in a terminal or a notebook, False for none.

    Raises:
        ReelQuantError: if a folder holds no clip, a file is broken, or a pair differs in size.
    """
    from reelquant.evidence import run

    check_sides("compare", {"reference": reference}, clips_on_disk)
    folders = dict(output=output, weights=weights, data=data)
    settings = dict(gate=gate, fail_under=fail_under, clip_model=clip_model, progress=progress)
    options = _options(metrics, folders, device=device, resume=resume, force=force, **settings)
    return run.compare(test, reference, prompts, options=options)


@verb(on_disk)
def benchmark(
    test: str | Path,
    reference: str | Path | None = None,
    *,
    rounds: int = 5,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    compiled: bool = False,
    runtime: str = "torch",
    memory: bool = True,
    prompt: str | Condition | None = None,
    variant: str | None = None,
    progress: Progress | Literal[False] | None = None,
    **call: Any,
) -> Benchmark:
    """Time a quantized pipeline against its float original on this machine, in turns; see :mod:`reelquant.evidence.speed`.

    Args:
        test: bundled name, folder or hub id of the quantized pipeline.
        reference: of the float pipeline; by default the one that ``test`` was quantized from, by its report.
        rounds: clips that each makes, after one that is not counted.
        dtype: of the float pipeline, and of the float parts of the quantized one; by default bfloat16, or float32 on processors that
            emulate it.
        device: where they run.
        compiled: both denoisers go through ``torch.compile(fullgraph=True)``.
        runtime: of the quantized denoisers, ``torch`` or ``openvino``.
        memory: also measure peak memory, which opens each pipeline once more.
        prompt: the text, or a condition with whatever else the clip is made from; by default one of the pipeline's own texts.
        variant: of the reference's weight files, ``fp16``, if it has several.
        progress: hears how far the run is; by default bars in a terminal or a notebook, False for none.
        call: arguments of the pipeline call (``num_inference_steps``, ``num_frames``, ``height`` ...), and conditions.

    Raises:
        ReelQuantError: one sentence on what is wrong and what would work.

    Example:
        >>> found = reelquant.benchmark("out", "tiny-dit", rounds=5, num_inference_steps=10)
        >>> found.speedup.median, found.peak_bytes
    """
    from reelquant.evidence.speed import benchmark as measured
    from reelquant.models.origin import float_original

    reference = float_original(test) if reference is None else reference
    check_sides("benchmark", {"reference": reference}, on_disk)
    how = dict(rounds=rounds, dtype=dtype, device=device, compiled=compiled, runtime=runtime, memory=memory, prompt=prompt, variant=variant)
    return measured(str(test), str(reference), progress=progress or None, **how, **call)


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

    model_in_memory("saturation", model)
    denoiser = model if isinstance(model, nn.Module) else denoiser_of(model)[1]
    with Saturation().counting(denoiser) as seen:
        yield seen


def _options(metrics: Sequence[str] | str, folders: Mapping[str, str | Path | None], **settings: Any) -> Options:
    """Options of an evaluation; None leaves the default."""
    from reelquant.evidence.run import Options

    names = [metrics] if isinstance(metrics, str) else metrics
    paths = {name: Path(folder) for name, folder in folders.items() if folder is not None}
    return Options(names, **paths, **{name: value for name, value in settings.items() if value is not None})
