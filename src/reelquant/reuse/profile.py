"""Which blocks of a chain can be reused: those whose change differs least from one denoising step to the next.

Paper: ProfilingDiT (arXiv 2504.03140) profiles a model once and caches some of its blocks, computing the others always. Theirs are the
blocks whose attention looks at the background; the lists are published for two models. Ours measures what reuse costs by itself: the
squared difference between a block's change at one step and at the step before, summed over the steps of held-out clips. All blocks of a
chain add to the same hidden states, so these sums can be compared.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reelquant.reuse.reuse import Reuse, installed_reuse, put, remove_reuse
from reelquant.reuse.trajectory import Trajectory
from reelquant.stages import ModelWork


def steadiest(work: ModelWork, chain: Sequence[str], share: float, always: Reuse, facts: Mapping[str, Any]) -> list[str]:
    """The blocks of a chain whose change differs least from step to step, in the order of the chain; one at least.

    Args:
        share: of the blocks.
        always: a reuse that computes everything.
        facts: what it needs to know of the chain.
    """
    moved = differences(work, chain, always, facts)
    count = max(round(share * len(chain)), 1)
    chosen = sorted(chain, key=lambda name: moved[name])[:count]
    return [name for name in chain if name in chosen]


def differences(work: ModelWork, chain: Sequence[str], always: Reuse, facts: Mapping[str, Any]) -> dict[str, float]:
    """Sums of squared differences of each block's change from step to step, over held-out clips in which all is computed."""
    moved = dict.fromkeys(chain, 0.0)
    before: dict[tuple[str, int], tuple[Tensor, ...]] = {}

    def see(block: str, trajectory: Trajectory, name: Any, tensors: tuple[Tensor, ...]) -> None:
        del name
        own, last = (block, trajectory.call), before.get((block, trajectory.call))
        if last is not None and trajectory.step:
            moved[block] += sum(float((a.float() - b.float()).square().sum()) for a, b in zip(tensors, last, strict=True))
        before[own] = tuple(tensor.clone() for tensor in tensors)

    put(work.denoiser, "blocks", always, dict(facts) | {"runs": [[name] for name in chain]})
    try:
        for block, stretch in zip(chain, installed_reuse(work.denoiser)["blocks"].installed.stretches, strict=True):
            stretch.watcher = functools.partial(see, block)
        with work.timed("profile blocks", len(work.timesteps)), torch.no_grad():
            work.held_out_latents()
    finally:
        remove_reuse(work.denoiser)
    return moved
