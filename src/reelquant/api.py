"""The verbs: quantize, plan, save, load. Each is a few calls into the floors below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reelquant.recipes.engine import Progress
    from reelquant.recipes.plan import Plan
    from reelquant.recipes.recipe import Recipe
    from reelquant.recipes.report import Report


def quantize(
    pipe: Any,
    recipe: str | Path | dict[str, Any] | Recipe,
    prompts: Sequence[str] | None = None,
    *,
    skip: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    progress: Progress | None = None,
    **call: Any,
) -> Report:
    """Quantize the denoiser of a diffusers pipeline in place.

    Args:
        pipe: any diffusers pipeline with a transformer or UNet, in float.
        recipe: a name from ``reelquant recipes``, a YAML file, a mapping or a :class:`Recipe`.
        prompts: calibration texts, or one text; by default the pipeline's own or general video prompts.
        skip: patterns of layers that stay float, on top of the recipe's.
        overrides: dotted changes to the recipe, ``{"calibrate.steps": 10}``.
        progress: hears how far the run is.
        call: arguments of the pipeline call during calibration (``num_inference_steps``, ``num_frames``, ``height`` ...).

    Returns:
        A report with sizes, errors and reasons.

    Raises:
        ReelQuantError: one sentence on what is wrong and what would work; the pipeline is as it was.

    Example:
        >>> import reelquant
        >>> pipe = reelquant.open_pipeline("tiny-dit")
        >>> report = reelquant.quantize(pipe, "qvd-w8a8")
        >>> reelquant.save(pipe, "out", report)
    """
    from reelquant.checkpoint import adopt
    from reelquant.discover.components import plain
    from reelquant.models.pipelines import calibration_prompts
    from reelquant.recipes.engine import quantize_pipeline
    from reelquant.recipes.recipe import load_recipe

    chosen = load_recipe(recipe, overrides)
    prompts = [prompts] if isinstance(prompts, str) else prompts  # a string is a sequence of letters, and nobody means that
    if prompts is None and chosen.calibrate is not None:
        prompts = calibration_prompts(pipe, chosen.calibrate.prompts + chosen.search.prompts)
    report = quantize_pipeline(pipe, chosen, prompts, skip=skip, progress=progress, **call)[0]
    if hasattr(denoiser := plain(pipe.components[report.component]), "register_to_config"):
        adopt(denoiser, chosen)
    return report


def plan(
    pipe: Any, recipe: str | Path | dict[str, Any] | Recipe, *, skip: Sequence[str] = (), overrides: dict[str, Any] | None = None
) -> Plan:
    """What a recipe would do to a pipeline: a row per layer, nothing is changed."""
    from reelquant.discover import denoiser_of, discover
    from reelquant.recipes.plan import make_plan
    from reelquant.recipes.recipe import load_recipe

    _, denoiser = denoiser_of(pipe)
    return make_plan(load_recipe(recipe, overrides), discover(denoiser), denoiser, skip)


def open_pipeline(model: str | Path, **options: Any) -> Any:
    """Open a float or quantized pipeline by bundled name, folder or hub id; see :func:`reelquant.models.pipelines.open_pipeline`."""
    from reelquant.models.pipelines import open_pipeline as opened

    return opened(model, **options)


def save(pipe: Any, folder: str | Path, report: Report | None = None, *, force: bool = False, **options: Any) -> Path:
    """Write a pipeline as a stock diffusers folder, complete or not at all; see :func:`reelquant.checkpoint.save`."""
    from reelquant.checkpoint import save as written

    return written(pipe, folder, report, force=force, **options)


def load(folder: str | Path, **options: Any) -> Any:
    """Open what :func:`save` wrote: :func:`open_pipeline` with ``dtype`` and ``device``, every layer checked against its checksum."""
    return open_pipeline(folder, **options)
