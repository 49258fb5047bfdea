"""What a denoiser keeps from step to step where parts of it are not computed: results that stand for later ones.

The reuse is installed on the model of the rehearsal, and the call that was rehearsed is followed once more: what is alive when it has
returned is kept. So nothing is known here of what a reuse keeps.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch

from reelquant.engine.plan import Plan
from reelquant.planning.parts import Part
from reelquant.planning.rehearsal import Scene
from reelquant.planning.trace import Rounding, Trace, traced
from reelquant.reuse import Reuse
from reelquant.reuse.reuse import Loaded


class Kept(NamedTuple):
    """A call with a reuse.

    Attributes:
        trace: what the call did, with all that it kept given back in the end.
        once: bytes that are alive when it has returned.
        results: how many such results are kept at a time, of one call of a step.
    """

    trace: Trace
    once: int
    results: int


def reuse_of(plan: Plan | None) -> Reuse | None:
    """The reuse of a plan; a denoiser has one at most."""
    return None if plan is None else next((entry.stage for entry in plan.entries if isinstance(entry.stage, Reuse)), None)


@torch.no_grad()
def follow(part: Part, reuse: Reuse, scene: Scene, rounding: Rounding) -> Kept:
    """Make the call of a denoiser's scene again, with a reuse on the model.

    Raises:
        UnsupportedError: if the model does not have what the reuse needs.
    """
    stage, facts = reuse.widest(cast(Any, Loaded(part.model, part.name, part.map)))
    installed = stage.install(part.model, facts)
    try:
        with traced(part.model, rounding) as trace:
            part.model(*scene.arguments, **scene.options)  # hooks of the model tell where the sampler is
            once = trace.alive
            installed.reset()
    finally:
        installed.remove()
    return Kept(trace, once, stage.remembers)
