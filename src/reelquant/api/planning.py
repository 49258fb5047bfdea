"""What would fit, and what a recipe would do. The verb is a few calls into the layers below."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from reelquant._errors import RecipeError, UnsupportedError
from reelquant.api.asked import anywhere, in_memory, verb
from reelquant.api.quantizing import layer_plan

if TYPE_CHECKING:
    import torch

    from reelquant._progress import Progress
    from reelquant.allocate import SensitivityTable
    from reelquant.engine.components import RecipeSource
    from reelquant.engine.plan import Plan
    from reelquant.planning import Planned
    from reelquant.planning.parts import Part

TRIED = 48  # whole allocations that the method surrogate learns from


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
    map: str | Path | SensitivityTable | None = None,
    allocate: str = "milp",
    skip: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    progress: Progress | Literal[False] | None = None,
    **call: Any,
) -> Planned | Plan:
    """Which recipes let a pipeline fit into a budget of memory; or, with a pipeline in memory and a recipe, what that does to its layers.

    The first reads config files and headers of weights. The stock pipeline makes one clip whose models run on the meta
    device, so that every component, the activations at this size, and every way of offloading count. Speeds are those of kernels that
    are timed on this machine at the shapes of the model's layers (once; they are kept in the user's cache). Weights are loaded only
    where denoisers get formats by layer, with ``bits`` or because no whole recipe fits: what rounding each layer does is read from a
    map, or measured by gradients if the pipeline fits into the memory of this machine. Else formats are chosen while quantizing.

    Args:
        model: bundled name, folder or hub id of a float pipeline; or a pipeline in memory.
        recipe: what to do to a pipeline in memory.
        max_memory: the budget, ``"12GB"`` or a number of bytes: of the device, or of the process on a CPU.
        device: where the pipeline shall run; it need not be there, speeds are unknown then.
        dtype: of the float parts; by default :func:`reelquant.kernels.native_float`.
        min_speed: how many times faster than in float a denoising step has to be.
        bits: denoisers get a format for every layer, so many bits per weight on average with scales.
        recipes: those that denoisers may get, in order of preference.
        map: a table of :func:`sensitivity`, its folder, or the folder to measure one into, which goes on where it was stopped. By default
            the user's cache. Its ``skip`` and ``fixed`` are followed.
        allocate: how bits are divided: ``milp``, ``greedy``, ``sampled`` or ``surrogate``.
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
    from reelquant.planning.formats import Formats

    heard = progress or None

    def formats(parts: Mapping[str, Part]) -> Formats:
        table = _table(model, map, allocate, parts, device, heard, call) if map is None or isinstance(map, str | Path) else map
        return Formats(table, allocate)

    usual = Formats(method=allocate)  # an unknown name is an error before anything is opened
    if bits is not None and (map is None or (isinstance(map, str | Path) and _map_file(map) is None)):
        usual.check_bits(bits)  # before a map of the usual formats is measured
    how = dict(device=device, dtype=dtype, min_speed=min_speed, bits=bits, recipes=recipes, formats=formats, progress=heard)
    return plan_memory(model, max_memory, call=call, **how)


def _table(
    model: str | Path,
    folder: str | Path | None,
    method: str,
    parts: Mapping[str, Part],
    device: str,
    progress: Progress | None,
    call: Mapping[str, Any],
) -> SensitivityTable | None:
    """The map of a model: read, or measured. None, and a remark, if this machine has no room to measure one."""
    import psutil

    from reelquant._numbers import size
    from reelquant._remarks import remark
    from reelquant.allocate.table import load_table
    from reelquant.api.sensing import sensitivity
    from reelquant.planning.formats import BASE, MEASURED, measuring_bytes
    from reelquant.planning.timing import here
    from reelquant.recipes.allocated import allocated

    tried = TRIED if method == "surrogate" else 0
    place = Path(folder) if folder is not None else _own_folder(model, call, tried)
    if (file := _map_file(place)) is not None:
        return load_table(file)
    needed, free = measuring_bytes(parts), psutil.virtual_memory().available
    if needed > free:
        remark(
            f"what each layer of '{model}' does was not measured: that takes {size(needed)} of memory and {size(free)} are free; "
            "formats are chosen while quantizing"
        )
        return None
    where = device if here(device) else "cpu"
    return sensitivity(
        model, place, recipe=allocated(BASE, {}, name=BASE), formats=MEASURED, inputs=(), configurations=tried, ranges=1, device=where,
        progress=progress or False, **call,
    )  # fmt: skip


def _map_file(place: str | Path) -> Path | None:
    """The file of a map that was measured; None for a folder without one."""
    from reelquant.allocate.table import FILE

    place = Path(place)
    file = place if place.suffix == ".json" else place / FILE
    return file if file == place or file.is_file() else None


def _own_folder(model: str | Path, call: Mapping[str, Any], tried: int) -> Path:
    """Where a map of these files at this size lies in the user's cache."""
    from reelquant._cache import cache_folder
    from reelquant.evidence.sampling import ClipSource

    source = ClipSource(model)
    about = json.dumps([source.identity, tried, {key: str(value) for key, value in sorted(call.items())}])
    return cache_folder() / "maps" / f"{source.name}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
