"""What follows the calls of a denoiser and of its attention: the step, the half of guidance, and the number of a call within a site."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reelquant.clock import holds_twice, timestep_reader
from reelquant.nn import AroundAttention, AttentionCall, put_around_attention, remove_around_attention
from reelquant.nn.around.attention_running import Where
from reelquant.reuse.attention.mode import Place
from reelquant.reuse.trajectory import Trajectory


class _Now(threading.local):
    """What a thread knows: the trajectory; whether its running call may reuse anything; the calls of each site in it."""

    trajectory: Trajectory | None = None
    follows: bool = False
    twice: bool = False
    calls: Counter[int] | None = None


class Following(AroundAttention):
    """Takes a denoiser's attention, and knows where each call stands. A copy starts with nothing behind it.

    Args:
        model: the denoiser.
        facts: names of its arguments ``timestep`` and ``latent``.
        sites: the modules whose calls are told apart.
    """

    order: ClassVar[int] = 1

    def __init__(self, model: nn.Module, facts: Mapping[str, Any], sites: Iterable[str]) -> None:
        super().__init__(sites)
        self.read_timestep, self.read_latent = (timestep_reader(model, facts[key]) for key in ("timestep", "latent"))
        self.now = _Now()
        self.model = model
        put_around_attention(model, self)
        self.hook = model.register_forward_pre_hook(self.begin, with_kwargs=True)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "now"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.now = _Now()

    @torch.compiler.disable
    def begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Before every call of the denoiser."""
        now, timestep, latent = self.now, self.read_timestep(args, kwargs), self.read_latent(args, kwargs)
        now.calls, now.follows, now.twice = Counter(), False, False
        if torch.is_grad_enabled() or timestep is None or not isinstance(latent, Tensor):
            now.trajectory = None
            return
        time = float(torch.as_tensor(timestep).float().amax())
        if now.trajectory is None or not now.trajectory.goes_on(time, latent):
            now.trajectory = Trajectory(time, latent)
        now.follows, now.twice = True, bool(holds_twice(latent))

    def placed(self, call: AttentionCall, where: Where) -> tuple[Place, Trajectory] | None:
        """Where a call stands; None for calls from elsewhere than the sites, and for those that must be computed."""
        now = self.now
        if self.names[where.row] not in self.sites or not now.follows or now.trajectory is None or now.calls is None:
            return None
        number, trajectory = now.calls[where.row], now.trajectory
        now.calls[where.row] += 1
        at = (where.row, number), trajectory.call, trajectory.step, now.twice, trajectory.timestep
        return Place(call, lambda one: self.compute(one, where), trajectory.notes, trajectory.notes, *at), trajectory

    def remove(self) -> None:
        """Leave the model as it was."""
        self.hook.remove()
        remove_around_attention(self.model, self)
        self.reset()

    def reset(self) -> None:
        """Forget every trajectory."""
        self.now = _Now()
