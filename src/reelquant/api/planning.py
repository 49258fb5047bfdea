"""What would fit, and what a recipe would do. The verb is a few calls into the layers below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from reelquant._errors import RecipeError, UnsupportedError
from reelquant.api.asked import anywhere, in_memory, verb
from reelquant.api.quantizing import layer_plan

if TYPE_CHECKING:
    import torch

    from reelquant._progress import Progress
    from reelquant.engine.components import RecipeSource
    from reelquant.engine.plan import Plan
    from reelquant.planning import Planned


@overload
def plan(model: str | Path, *, max_memory: int | str, **options: Any) -> Planned: ...
@overload
def plan(model: Any, recipe: RecipeSource, **options: Any) -> Plan: ...
@verb(anywhere)
def plan(
    model: Any,
    recipe: RecipeSource | None = None,
    *,
    max_memory: int | str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    min_speed: float | None = None,
    bits: float | None = None,
    recipes: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    progress: Progress | Literal[False] | None = None,
    **call: Any,
) -> Planned | Plan:
    """Which recipes let a pipeline fit into a budget of memory; or, with a pipeline in memory and a recipe, what that does to its layers.

    The first reads config files and headers of weights, and loads no weight. The stock pipeline makes one clip whose models run on the meta
    device, so that every component, the activations at this size, and every way of offloading count. Speeds are those of kernels that
    are timed on this machine at the shapes of the model's layers (once; they are kept in the user's cache).

    Args:
        model: bundled name, folder or hub id of a float pipeline; or a pipeline in memory.
        recipe: what to do to a pipeline in memory.
        max_memory: the budget, ``"12GB"`` or a number of bytes: of the device, or of the process on a CPU.
        device: where the pipeline shall run; it need not be there, speeds are unknown then.
        dtype: of the float parts; by default :func:`reelquant.kernels.native_float`.
        min_speed: how many times faster than in float a denoising step has to be.
        bits: denoisers get a format for every layer, so many bits per weight on average with scales.
        recipes: those that denoisers may get, in order of preference.
        skip: as in :func:`quantize`, with a recipe.
        overrides: as in :func:`quantize`, with a recipe.
        inputs: as in :func:`quantize`, with a recipe.
        progress: hears how far it is; by default bars in a terminal or a notebook, False for none.
        call: arguments of the pipeline call (``num_frames``, ``height``, ``width``, ``num_inference_steps`` ...).

    Returns:
        What fits, the best way first, with predicted peaks and speeds and their error bands; or, with a recipe, a row per layer of the
        first denoiser.

    Raises:
        ReelQuantError: if nothing fits (with the smallest budget that would do), or the pipeline cannot be followed.

    Example:
        >>> reelquant.plan("wan-1.3b", max_memory="12GB", num_frames=81, height=480, width=832).best.command
        >>> reelquant.plan(pipe, "qvd-w8a8").quantized
    """
    if recipe is not None:
        in_memory("plan", model)
        return layer_plan(model, recipe, skip=skip, overrides=overrides, inputs=inputs, **call)
    if not isinstance(model, str | Path):
        raise UnsupportedError("plan takes a pipeline in memory with a recipe, reelquant.plan(pipe, 'w8a16'), or a folder with max_memory")
    if max_memory is None:
        raise RecipeError(f"plan needs a budget: reelquant.plan('{model}', max_memory='12GB')")
    from reelquant.planning import plan_memory

    how = dict(device=device, dtype=dtype, min_speed=min_speed, bits=bits, recipes=recipes, progress=progress or None)
    return plan_memory(model, max_memory, call=call, **how)
