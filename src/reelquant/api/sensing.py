"""What rounding each layer does. The verb is a few calls into the layers below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reelquant.api.asked import anywhere, verb
from reelquant.recipes.usual import MAPPED

if TYPE_CHECKING:
    import torch

    from reelquant._progress import Progress
    from reelquant.allocate.table import Measure, SensitivityTable
    from reelquant.engine.components import RecipeSource
    from reelquant.models.condition import Prompts


@verb(anywhere)
def sensitivity(
    model: Any,
    output: str | Path | None = None,
    *,
    recipe: RecipeSource = MAPPED,
    measures: Sequence[Measure] = ("gradient",),
    formats: Sequence[str] | None = None,
    inputs: Sequence[str] | None = None,
    clips: int = 4,
    ranges: int = 5,
    configurations: int = 0,
    components: Sequence[str] | None = None,
    steps: bool = False,
    skip: Sequence[str] = (),
    step_bits: float | None = None,
    step_weight_bits: float | None = None,
    trials: int = 8,
    prompts: Prompts | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | Literal[False] | None = None,
    **call: Any,
) -> SensitivityTable:
    """Measure what rounding each layer to each format does to the clips of a float pipeline. The pipeline stays as it is.

    Three ways fill one table. ``trajectory`` samples the clips once for every layer and format: the damage itself. ``gradient`` needs three
    backward passes through the sampler for every clip, whatever the number of layers and formats, and tells steps and halves of guidance
    apart.
    ``noise`` multiplies the noise of rounding with how far injected noise reaches. All three are in one unit: squared error of the final
    latents over their variance. See :mod:`reelquant.damage`, and docs/sensitivity.md for the file.

    Args:
        model: bundled name, folder or hub id of a float pipeline, or one in memory.
        output: folder for ``sensitivity.json``, its picture, and what was measured so far: a run that was stopped goes on from there.
        recipe: which layers are quantized, the range rule of their weights, and the granularity of their inputs.
        measures: ``trajectory``, ``gradient``, ``noise``, any of them.
        formats: of weights, ``FORMAT/GRANULARITY``; by default 3 to 8 bits.
        inputs: of inputs; by default the recipe's own with 3 to 8 bits, empty for none.
        clips: how many are sampled.
        ranges: into how many ranges the steps are divided for the map of layers over steps.
        configurations: whole allocations that are tried out beside, for the method ``surrogate``.
        components: denoisers; by default all.
        steps: whether all inputs, and all weights, are rounded at single steps and sampled, for budgets over the steps;
            ``trajectory`` does it anyway. The map of layers over steps then has every step, up to 16.
        skip: patterns of layers that are left out.
        step_bits, step_weight_bits: budgets of bits of inputs and weights over steps and layers; the plans for them are sampled on other
            texts, and :func:`reelquant.allocate.allocate_steps` chooses by what they did.
        trials: clips of these samplings.
        prompts: texts or conditions of the clips; by default the pipeline's own or general video prompts.
        dtype: of a pipeline that is opened, float32 by default.
        device: where it runs.
        force: replace the table of another measurement.
        progress: receives the progress; by default bars in a terminal or a notebook, False for none.
        call: arguments of the pipeline call (``num_inference_steps``, ``num_frames`` ...).

    Returns:
        The table; :func:`reelquant.allocate.allocate` divides a budget by it.

    Raises:
        ReelQuantError: for a format or pattern that does not fit, a folder with another measurement, or clips that are not finite.

    Example:
        >>> table = reelquant.sensitivity("tiny-dit", "map")
        >>> from reelquant.allocate import allocate
        >>> allocate(table, bits=4.5).bits
        4.499
    """
    import torch

    from reelquant.checkpoint import check_folder
    from reelquant.damage import Wanted, measure
    from reelquant.damage.run import FORMATS
    from reelquant.models.pipelines import open_pipeline

    wanted = Wanted(
        recipe=recipe,
        measures=tuple(measures),
        formats=FORMATS if formats is None else tuple(formats),
        inputs=None if inputs is None else tuple(inputs),
        clips=clips,
        ranges=ranges,
        configurations=configurations,
        components=None if components is None else tuple(components),
        steps=steps,
        skip=tuple(skip),
        budgets={part: bits for part, bits in (("input", step_bits), ("weight", step_weight_bits)) if bits is not None},  # type: ignore[misc]
        trials=trials,
    )
    folder = None if output is None else Path(output)
    if folder is not None:
        check_folder(folder)
    opened = open_pipeline(model, dtype=dtype or torch.float32, device=device) if isinstance(model, str | Path) else model
    prompts = [prompts] if isinstance(prompts, str) else prompts
    return measure(opened, model, folder, wanted, prompts, force=force, progress=progress or None, call=call).table
