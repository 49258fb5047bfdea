"""At which steps a stretch of blocks is computed under a budget, planned while quantizing, and what stands for it at the others.

Paper: CacheQuant (arXiv 2503.01323): a schedule by dynamic programming over recorded features, and what is reused is corrected by least
squares. Deviations: :mod:`reelquant.reuse.plans` says how errors of steps add up; a correction is a weight for each of the last results,
the same for all channels (theirs: a scale and an offset for every channel of the last one); an error counts :data:`EARLY` times as much
at the first step as at the last, evenly falling in between (theirs: all alike). ``reelquant tune`` measures what every step does instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from reelquant._errors import RecipeError, UnsupportedError
from reelquant.reuse.plans import Errors, flat_weights, plans
from reelquant.reuse.recorded import Results
from reelquant.reuse.reuse import Reuse, installed_reuse, put, remove_reuse
from reelquant.stages import ModelWork

EARLY = 10.0
"""What an error at the first step counts, over one at the last."""


def planned(work: ModelWork, facts: Mapping[str, Any], always: Reuse, share: float, order: int) -> dict[str, list[float]]:
    """``at``, the timesteps at which the stretch is computed, and ``fitted``, the weights at the others, as
    :class:`reelquant.reuse.BlockReuse` has them.

    Args:
        facts: of the stretch.
        always: a reuse of it that computes everything.
        share: of the steps at which it is computed; the first step always is.

    Raises:
        UnsupportedError: if the sampler's steps do not follow each other with falling timesteps.
        RecipeError: if so few steps cannot be planned.
    """
    errors = recorded(work, facts, always, "budget")
    steps = len(errors.timesteps)
    known, count = plans(errors, order), max(round(share * steps), 1)
    if count not in known:
        raise RecipeError(f"'budget' of reuse 'blocks' is {share:g}: {count} of {steps} steps, and {min(known)} is the least; give more")
    chosen = known[count].steps
    return {"at": [round(errors.timesteps[step], 4) for step in chosen], "fitted": flat_weights(errors, chosen, order)}


def recorded(work: ModelWork, facts: Mapping[str, Any], always: Reuse, key: str) -> Errors:
    """What is planned with: held-out clips are sampled once, everything computed. The key of the recipe that asks is for errors."""
    results = Results(facts["blocks"][-1])
    put(work.denoiser, "blocks", always, facts)
    try:
        installed_reuse(work.denoiser)["blocks"].installed.watch(results)
        with work.timed("record blocks", work.steps), torch.no_grad():
            work.held_out_latents()
    finally:
        remove_reuse(work.denoiser)
    times = results.timesteps
    if times is None or len(times) < 3:
        raise UnsupportedError(
            f"'{key}' of reuse 'blocks' needs three steps or more that follow each other with falling timesteps, and '{work.component}' "
            f"was called at {sorted(results.times.values(), reverse=True)}"
        )
    return Errors(times, results.gram(), np.linspace(EARLY, 1.0, len(times)), fitted=True)
