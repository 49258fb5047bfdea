"""What need not be computed. The verb is a few calls into the layers below."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reelquant.api.asked import on_disk, verb

if TYPE_CHECKING:
    import torch

    from reelquant._progress import Progress
    from reelquant.models.condition import Prompts
    from reelquant.tuning import Tuned


@verb(on_disk)
def tune(
    model: str | Path,
    output: str | Path,
    *,
    target_speedup: float | None = None,
    gate: str | None = "default",
    limits: Mapping[str, float] | None = None,
    clips: int = 8,
    prompts: Prompts | None = None,
    held_out: Prompts | None = None,
    reference: str | Path | None = None,
    record: int = 4,
    search: int = 8,
    component: str | None = None,
    stretch: tuple[float, ...] = (0.0, 1.0),
    weights: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    force: bool = False,
    shared: bool = False,
    progress: Progress | Literal[False] | None = None,
    **call: Any,
) -> Tuned:
    """Find out at which steps the blocks of a quantized pipeline need not be computed, and write the pipeline with that schedule.

    A few clips are recorded with everything computed. A schedule of the least expected error is planned for every number of computed
    steps, and some of these are tried out on other texts, against the same pipeline without reuse or against ``reference``. The result
    opens with stock ``from_pretrained``; see :class:`reelquant.reuse.BlockReuse`.

    Args:
        model: folder of a quantized pipeline.
        output: the folder to write. What was tried is kept beside it, in ``<output>.tuning``; a run that was stopped goes on from there.
        target_speedup: times faster that a whole clip has to be; the best schedule that is so fast is chosen, if it keeps the limits.
        gate: preset that trials have to pass, ``strict``, ``default`` or ``loose``; the fastest that passes is chosen. None for the limits
            alone. Without effect if a speed is wanted.
        limits: further limits, by metric: ``{"lpips_alex": 0.1}``.
        clips: clips that every schedule is tried on.
        prompts: texts or conditions to record, of which the first ``record`` are used; by default the pipeline's own or general video
            prompts.
        held_out: texts or conditions of the trials; by default evaluation captions or bundled prompts that are not recorded.
        reference: the float pipeline. Limits then hold for quantization and reuse together, as those of :func:`reelquant.evaluate` do;
            by default for reuse alone.
        record: clips that schedules are planned from. They are sampled once for every step.
        search: schedules that are sampled on twice as many clips as are recorded. Their figures say whether damages of single steps
            are to be believed when schedules are planned; 0 believes them.
        component: which denoiser, where there are several (two experts). The others stay as they are: what they reuse already they go on to
            reuse, and the limits are held against clips in which nothing is reused.
        stretch: the share of the blocks that is reused, in the order in which they run; empty for the whole answer of the denoiser.
        weights: folder with networks of metrics; else the user's cache.
        dtype: of the float parts, float32 by default.
        device: where it runs.
        force: replace an existing output.
        shared: the processes that torchrun, ``accelerate launch`` or ``srun`` started share the sampling; see docs/ranks.md.
        progress: receives the progress; by default bars in a terminal or a notebook, False for none.
        call: arguments of the pipeline call (``num_inference_steps``, ``num_frames``, ``height`` ...).

    Returns:
        What was chosen, everything that was tried, and the measured speed. ``output`` is None if no schedule kept the limits.

    Raises:
        ReelQuantError: if the pipeline is not quantized, has several denoisers and none is named, or too few steps, or cannot be as fast.

    Example:
        >>> made = reelquant.tune("out", "fast", target_speedup=1.8)
        >>> made.speedup, made.chosen.figures["psnr"], made.cliff
    """
    from reelquant.tuning import Goal
    from reelquant.tuning import tune as run

    goal = Goal(target_speedup, gate, dict(limits or {}))
    where = dict(
        stretch=stretch,
        clips=clips,
        recorded=record,
        searched=search,
        held_out=held_out,
        reference=reference,
        weights=weights,
        dtype=dtype,
        device=device,
        force=force,
    )
    where |= {"shared": shared, "component": component}
    return run(model, output, prompts, goal=goal, progress=progress or None, call=call, **where)
