"""Which denoising step is running: a 0-d tensor that follows the timestep the denoiser is called with.

Per-step scales are ``table.index_select(0, clock.slot)``, so one compiled graph serves all steps. Slots are found by the nearest stored
timestep, never by a step counter: a 50-step calibration serves a 20-step sampler, and a sampler that repeats or skips steps stays right.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

logger = logging.getLogger(__name__)
NAME = "reelquant_clock"  # the denoiser's submodule
TOLERANCE = 2**-11  # relative: timesteps are stored as float32 and may come back as float16; neighbouring integers stay apart


class Clock(nn.Module):
    """Follows the timestep of a denoiser.

    Attributes:
        timesteps: ``[slots]`` float32, the timesteps of calibration in sampling order; model units (usually 0 to 1000).
        slot: 0-d int64, index of the stored timestep nearest to the current one.
        stored: 0-d bool, True while the current call has a single timestep and it is a stored one. Only then may a table of outputs
            be used.
        argument: name of the denoiser's timestep argument; set by :func:`attach`.
        tables: whether tables of outputs may be used at all.
    """

    timesteps: Tensor
    slot: Tensor
    stored: Tensor

    def __init__(self, timesteps: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("timesteps", torch.tensor(list(timesteps) or [0.0], dtype=torch.float32), persistent=False)
        self.register_buffer("slot", torch.zeros((), dtype=torch.long), persistent=False)
        self.register_buffer("stored", torch.zeros((), dtype=torch.bool), persistent=False)
        self._now: tuple[int, bool] | None = None
        self.argument, self.tables = "timestep", True
        self._told = False
        self._timestep, self._mixed = 0.0, False

    def tick(self, timestep: Tensor | float) -> None:
        """Set :attr:`slot` and :attr:`exact` for a call with this timestep: a number, one per clip, or one per token."""
        times = torch.as_tensor(timestep, device=self.timesteps.device).float().reshape(-1)
        now = times.amax()  # frames given as a condition carry timestep 0
        distance = (self.timesteps - now).abs()
        self.slot.copy_(distance.argmin())
        self.stored.copy_((distance.amin() <= TOLERANCE * now.abs()) & (times == now).all())
        if not self.tables:
            self.stored.zero_()
        self._now = None
        if not torch.compiler.is_compiling():
            self._timestep, self._mixed = float(now), bool((times != now).any())

    def now(self) -> tuple[int, bool]:
        """:attr:`slot` and :attr:`stored` as Python values, read once per call."""
        if self._now is None:
            self._now = int(self.slot), bool(self.stored)
        return self._now

    def fall_back(self) -> None:
        """Say once that a table of outputs is not used because the current timestep is not in it."""
        if self._told or not self.tables:
            return
        why = "is not the only one of its call" if self._mixed else f"is none of the {len(self.timesteps)} in the table"
        logger.warning("timestep %g %s: temporal layers are computed", self._timestep, why)
        self._told = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Clock:
        """``.to(bfloat16)`` moves a clock and leaves its numbers alone: 999 would become 1000."""
        return super()._apply(keeping_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return f"slots={len(self.timesteps)}"


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``Module.to`` and its kin do to a tensor, without the change of dtype: for numbers that a cast would destroy."""

    def moved(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        return new if new.dtype == tensor.dtype else tensor.to(new.device)

    return moved


def timestep_reader(denoiser: nn.Module, argument: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """A function that reads the timestep out of ``(args, kwargs)`` of a denoiser call; None if the call has none."""
    parameters = list(inspect.signature(denoiser.forward).parameters)
    position = parameters.index(argument)

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return kwargs.get(argument, args[position] if len(args) > position else None)

    return read


def attach(denoiser: nn.Module, clock: Clock, argument: str) -> RemovableHandle:
    """Make the clock a part of the denoiser, ticked before every call; the timestep of a call is called ``argument``.

    The hook finds the clock through the module it is called for, so a deep copy of the denoiser ticks its own copy.
    """
    read = timestep_reader(denoiser, argument)
    clock.argument = argument
    denoiser.add_module(NAME, clock)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = read(args, kwargs)
        if timestep is not None:
            getattr(module, NAME).tick(timestep)

    return denoiser.register_forward_pre_hook(before, with_kwargs=True)
