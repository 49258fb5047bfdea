"""Stretches of blocks on a model: which one acts at a call of the denoiser, and how much they computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant.clock import timestep_reader
from reelquant.nn import get_module
from reelquant.reuse.answer import Answer
from reelquant.reuse.chain import Link
from reelquant.reuse.outputs import Output
from reelquant.reuse.stretch import StandIn, Stretch, Watcher

KEEPS: dict[str, type[StandIn]] = {"change": Link, "outputs": Output, "answer": Answer}
"""What is kept of a stretch."""


class InstalledBlocks:
    """Stretches of blocks that are reused: one, several at once, or one early and one late in a trajectory.

    Args:
        facts: see :meth:`reelquant.reuse.BlockReuse.facts`.
        new: makes a stretch.
        boundary: the late stretch acts from this share of the first timestep on.
    """

    def __init__(self, model: nn.Module, facts: Mapping[str, Any], new: Callable[[], Stretch], boundary: float) -> None:
        self.read_timestep, self.read_latent = (timestep_reader(model, facts[key]) for key in ("timestep", "latent"))
        self.boundary, stands = boundary, KEEPS[facts.get("keeps", "change")]
        self.blocks: list[StandIn] = []

        def made(names: Sequence[str]) -> Stretch:
            stretch = new()
            ends = {"first": names[0], "last": names[-1]}
            self.blocks += [
                stands(name, get_module(model, name), stretch, **{end: name == one for end, one in ends.items()}) for name in names
            ]
            return stretch

        self.early = [made(names) for names in facts.get("runs", [facts["blocks"]])]
        self.late = [made(facts["late"])] if "late" in facts else []
        self.stretches = [*self.early, *self.late]
        self.handle = model.register_forward_pre_hook(self.begin, with_kwargs=True)

    @torch.compiler.disable
    def begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Before every call of the denoiser."""
        if getattr(model, "is_cache_enabled", False):
            raise UnsupportedError(f"{type(model).__name__} reuses blocks already; call disable_cache() to undo diffusers' own cache")
        timestep, latent = self.read_timestep(args, kwargs), self.read_latent(args, kwargs)
        if torch.is_grad_enabled() or timestep is None or not isinstance(latent, Tensor):
            for stretch in self.stretches:
                stretch.compute() if stretch in self.early else stretch.rest()
            return
        trajectories = [stretch.follow(float(torch.as_tensor(timestep).float().amax()), latent) for stretch in self.stretches]
        late = bool(self.late) and trajectories[0].timestep <= self.boundary * trajectories[0].start
        for stretch, trajectory in zip(self.stretches, trajectories, strict=True):
            stretch.begin() if (stretch in self.late) == late else stretch.rest(trajectory)

    def watch(self, watcher: Watcher | None) -> None:
        """Call this with everything that is kept from now on; None stops that."""
        for stretch in self.stretches:
            stretch.watcher = watcher

    def remove(self) -> None:
        """Leave the model as it was."""
        self.handle.remove()
        for block in reversed(self.blocks):
            block.remove()
        self.reset()

    def reset(self) -> None:
        """Forget every trajectory, its tensors and all counts."""
        for stretch in self.stretches:
            stretch.reset()

    def counts(self) -> dict[str, int]:
        """Passes through stretches."""
        found = {"computed": 0, "reused": 0}
        for (name, _), count in self._counted.items():
            found[name] += count
        return found

    def by_step(self) -> dict[int, tuple[int, int]]:
        """Passes through stretches that were computed, and those that were reused, by the number of the step."""
        counted = self._counted
        return {step: (counted["computed", step], counted["reused", step]) for step in sorted({step for _, step in counted})}

    def by_cell(self) -> dict[str, dict[int, tuple[int, int]]]:
        """The same by block; a block that only stretches at rest hold at a step is not counted there, and computes."""
        found: dict[str, Counter[tuple[str, int]]] = {}
        for block in self.blocks:
            found[block.name] = found.get(block.name, Counter()) + block.stretch.counted
        steps = {name: sorted({step for _, step in counted}) for name, counted in found.items()}
        return {name: {step: (found[name]["computed", step], found[name]["reused", step]) for step in steps[name]} for name in found}

    @property
    def _counted(self) -> Counter[tuple[str, int]]:
        return sum((stretch.counted for stretch in self.stretches), Counter())

    @property
    def parts(self) -> list[str]:
        """Module paths of the blocks that are reused at some time."""
        return list(dict.fromkeys(block.name or type(block.block).__name__ for block in self.blocks))
