"""What is read of a denoiser's calls, and which of them are recorded."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from reelquant.clock import ANY, BOTH, Clock, holds_twice, timestep_reader
from reelquant.engine.plan import Plan
from reelquant.observe import RecordedCall, Recording, time_of


def timestep_reader_of(module: nn.Module, argument: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """Reads the timestep of a call; None for an encoder of pictures, which is called without."""
    timed = argument in inspect.signature(module.forward).parameters
    return timestep_reader(module, argument) if timed else lambda args, kwargs: None


def half_reader(denoiser: nn.Module, plan: Plan) -> Callable[[tuple[Any, ...], dict[str, Any]], int]:
    """Which half of a guidance pair a call computes.

    Both, if it holds its latents twice; the second, if the call before had the same latents; else the first.
    """
    argument = plan.map.latent_argument or "hidden_states"
    if argument not in inspect.signature(denoiser.forward).parameters:  # an encoder of pictures
        return lambda args, kwargs: 1
    read = timestep_reader(denoiser, argument)
    clock = Clock([], pairs="sequential")

    def half_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        latent = read(args, kwargs).detach().cpu()
        if bool(holds_twice(latent)):
            return BOTH
        clock.look(latent)
        return int(clock.which)

    return half_of


def frames_reader(denoiser: nn.Module, plan: Plan) -> Callable[[tuple[Any, ...], dict[str, Any]], int]:
    """The frames of a call's latents: ``[B, C, F, H, W]`` or ``[B, F, C, H, W]``; of packed latents what the call says; else 1."""
    argument = plan.map.latent_argument or "hidden_states"
    if argument not in inspect.signature(denoiser.forward).parameters:  # an encoder of pictures
        return lambda args, kwargs: 1
    read = timestep_reader(denoiser, argument)
    channels = getattr(getattr(denoiser, "config", None), "in_channels", None)

    def frames_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        latent, told = read(args, kwargs), kwargs.get("num_frames")
        if isinstance(latent, Tensor) and latent.ndim == 5:
            return latent.shape[1] if latent.shape[2] == channels != latent.shape[1] else latent.shape[2]
        return told if isinstance(told, int) else 1

    return frames_of


GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, modulo 1, are spread evenly over [0, 1), however many there are."""


class Recorder:
    """Records calls of a denoiser, evenly over all that are made: one of every ``stride`` calls.

    The place of the recorded call among its ``stride`` calls changes from one recorded call to the next. A fixed place would meet the
    same denoising step of every run, or the same half of every guidance pair, where the stride is a multiple of their number.

    Whenever it holds twice as many as wanted, one of every two goes, and from then on half as many are taken. Which of the two goes follows
    the same rule: of pairs of guidance halves, both kinds stay.

    Attributes:
        timesteps: of the recorded calls.
    """

    def __init__(
        self, wanted: int, expected: int, timestep_of: Callable[..., Any], half_of: Callable[..., int] = lambda args, kwargs: ANY
    ) -> None:
        self.wanted, self.timestep_of, self.half_of = wanted, timestep_of, half_of
        self.stride, self.calls = max(expected // max(wanted, 1), 1), 0
        self._recording = Recording()
        self.timesteps: list[float] = []

    @classmethod
    def of(cls, denoiser: nn.Module, plan: Plan, wanted: int, expected: int, *, halves: bool) -> Recorder:
        """A recorder of this denoiser's calls that reads the halves of guidance itself: it knows a second call by the one before."""
        own = {"half_of": half_reader(denoiser, plan)} if halves else {}
        return cls(wanted, expected, timestep_reader_of(denoiser, plan.map.timestep_argument or "timestep"), **own)

    @contextmanager
    def watching(self, denoiser: nn.Module, due: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Inside, calls are recorded while ``due`` says so."""

        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if due():
                self._see(args, kwargs, output)

        hooks = [denoiser.register_forward_hook(see, with_kwargs=True)] if self.wanted else []
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, args: Any, kwargs: Any, output: Any) -> None:
        (part, place), self.calls = divmod(self.calls, self.stride), self.calls + 1
        half = self.half_of(args, kwargs)
        if place != int(self.stride * (part * GOLDEN % 1)):
            return
        self.timesteps.append(time_of(self.timestep_of(args, kwargs)))
        self._recording.append(RecordedCall(args, kwargs, output, half=half))
        if len(self._recording) >= 2 * self.wanted:
            self._thin()

    def _thin(self) -> None:
        kept = [2 * pair + int(2 * (pair * GOLDEN % 1)) for pair in range(len(self._recording) // 2)]
        self._recording.keep(kept)
        self.timesteps = [self.timesteps[number] for number in kept]
        self.stride *= 2

    def recording(self, timesteps: Sequence[float]) -> Recording:
        """The calls, each with the index of its timestep."""
        self._recording.number([timesteps.index(timestep) for timestep in self.timesteps])
        return self._recording
