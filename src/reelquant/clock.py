"""Which denoising step is running: a 0-d tensor that follows the timestep the denoiser is called with.

Per-step scales are ``table.index_select(0, clock.slot)``, so one compiled graph serves all steps. Slots are found by the nearest stored
timestep, never by a step counter: a 50-step calibration serves a 20-step sampler, and a sampler that repeats or skips steps stays right.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

logger = logging.getLogger(__name__)
NAME = "reelquant_clock"  # the denoiser's submodule
Inputs = Literal["float", "8-bit"]  # of protected steps
OWN, FLOAT = 0, 16  # bits at a step: those of the layer; none are rounded
FEWEST, MOST = 2, 8  # bits at a step, otherwise
PROTECTED: dict[Inputs, int] = {"float": FLOAT, "8-bit": 8}  # bits of inputs at protected steps
Pairs = Literal["batched", "sequential"]  # how a pipeline calls its denoiser for classifier-free guidance
ANY, FIRST, SECOND, BOTH = range(4)  # which half of a guidance pair a call computes; any: not told apart
TOLERANCE = 2**-11  # relative: timesteps are stored as float32 and may come back as float16; neighbouring integers stay apart


class Widths(NamedTuple):
    """Bits at one denoising step.

    Attributes:
        inputs: of integers that inputs are rounded to; :data:`OWN`, or :data:`FLOAT` for inputs that are not rounded.
        weights: at which integer weights of more bits are read; :data:`OWN` for all that are stored.
    """

    inputs: int = OWN
    weights: int = OWN


AS_STORED = Widths()


class Apart(NamedTuple):
    """Layers that have bits of steps of their own.

    Attributes:
        layers: their names.
        widths: bits of every slot.
    """

    layers: tuple[str, ...]
    widths: tuple[Widths, ...]


class Moment(NamedTuple):
    """What a layer has to know about the call it is in.

    Attributes:
        slot: index of the denoising step.
        exact: whether the current timestep is the very one of that step.
        protected: whether the step is protected.
        half: which half of a guidance pair the call computes.
        row: row of the layer's input scales; None where it is ``slot``.
        widths: bits of the layer at this step.
    """

    slot: int | Tensor = 0
    exact: bool = False
    protected: bool = False
    half: int = ANY
    row: int | Tensor | None = None
    widths: Widths = AS_STORED


class Clock(nn.Module):
    """Follows the timestep of a denoiser.

    Attributes:
        timesteps: ``[slots]`` float32, the timesteps of calibration in sampling order; model units (usually 0 to 1000).
        slot: 0-d int64, index of the stored timestep nearest to the current one.
        stored: 0-d bool, True while the current call has a single timestep and it is a stored one. Only then may a table of outputs
            be used.
        widths: bits of every slot, in a recipe's words; empty where all steps have the same. Protected steps keep theirs beside it.
        apart: groups of layers with other bits; :attr:`widths` are those of all others. Groups are numbered from 1, all others are group 0.
        protected_slots: steps at which layers do not round their inputs, or do it more finely; set by :meth:`protect`.
        protects: ``[slots]`` bool, the same as a table.
        protected: 0-d bool, whether the current slot is one of them.
        inputs: what happens there: ``float`` leaves inputs unrounded, ``8-bit`` rounds to eight bits what has fewer.
        pairs: how guidance calls come, if its halves have scales of their own: both in one ``batched`` call, which then holds the
            latents twice, or ``sequential``, a second call on the latents of the first.
        which: 0-d int64, what the current call computes: :data:`ANY`, :data:`FIRST`, :data:`SECOND` or :data:`BOTH`.
        latent: name of the denoiser's latent argument, which guidance calls are known by.
        argument: name of the denoiser's timestep argument; set by :func:`attach`.
        home: the denoiser that ticks this clock; a copied clock still names the original's.
        tables: whether tables of outputs may be used at all.
        adapted: whether an adapter changes what they hold; then they are not used.
    """

    timesteps: Tensor
    slot: Tensor
    stored: Tensor
    protects: Tensor
    protected: Tensor
    inputs: Inputs
    which: Tensor
    seen: Tensor
    home: weakref.ref[nn.Module] | None

    def __init__(
        self,
        timesteps: Sequence[float],
        protected: Sequence[int] = (),
        inputs: Inputs = "float",
        pairs: Pairs | None = None,
        latent: str | None = None,
        widths: Sequence[Widths] = (),
        apart: Sequence[Apart] = (),
    ) -> None:
        super().__init__()
        self.widths, self.apart = tuple(widths), tuple(apart)
        self.register_buffer("timesteps", torch.tensor(list(timesteps) or [0.0], dtype=torch.float32), persistent=False)
        self.register_buffer("slot", torch.zeros((), dtype=torch.long), persistent=False)
        self.register_buffer("stored", torch.zeros((), dtype=torch.bool), persistent=False)
        self.register_buffer("protects", torch.zeros(len(self.timesteps), dtype=torch.bool), persistent=False)
        self.register_buffer("protected", torch.zeros((), dtype=torch.bool), persistent=False)
        self.register_buffer("which", torch.zeros((), dtype=torch.long), persistent=False)
        self.register_buffer("seen", torch.full((2,), torch.nan), persistent=False)
        self.pairs, self.latent = pairs, latent
        self._now: dict[int, Any] = {}  # by thread: several may run one denoiser, each at a step of its own
        self._calls: dict[int, tuple[Tensor, Tensor]] = {}  # by thread, too: what :attr:`seen` and :attr:`which` are in graphs
        self._given: dict[int, int] = {}  # by thread: the half of calls inside :meth:`computing`
        self.protect(protected, inputs)
        self.argument, self.tables, self.adapted = "timestep", True, False
        self._told, self.home = False, None
        self._timestep, self._mixed = 0.0, False

    def protect(self, slots: Sequence[int], inputs: Inputs = "float") -> None:
        """Protect the steps of these slots, and no others."""
        chosen = sorted(set(slots))
        self.protects.zero_()
        self.protects[chosen] = True
        self.protected_slots, self.inputs = tuple(chosen), inputs
        self._now = {}

    def change_bits(self, widths: Sequence[Widths], apart: Sequence[Apart] = ()) -> None:
        """Give every slot its bits; none for the same at all steps. Protected steps stay protected.

        Layers know the number of their group: of a clock that has started, :func:`reelquant.nn.change_bits` tells them.
        """
        self.widths, self.apart = tuple(widths), tuple(apart)
        self._now = {}

    def group_of(self, layer: str) -> int:
        """The number of the group that a layer of this name is in."""
        return next((number for number, group in enumerate(self.apart, 1) if layer in group.layers), 0)

    @property
    def changes_bits(self) -> bool:
        """Whether layers compute some steps in other bits than they store."""
        return bool(self.protected_slots or self.widths or self.apart)

    def at(self, slot: int, group: int = 0) -> Widths:
        """The bits that a group of layers has at a step."""
        own = self.apart[group - 1].widths if group else self.widths
        widths = own[slot] if own else AS_STORED
        return widths._replace(inputs=PROTECTED[self.inputs]) if slot in self.protected_slots else widths

    @property
    def bits(self) -> list[Any]:
        """What layers compute in, at every step, as plain data."""
        every = [[tuple(self.at(slot, group)) for slot in range(len(self.timesteps))] for group in range(1 + len(self.apart))]
        return [*every, *(group.layers for group in self.apart)]

    @contextmanager
    def computing(self, half: int) -> Generator[None]:
        """Inside, eager calls of this thread compute this half, whatever their latents say.

        A recorded call is made again without the call before it, so its latents do not tell whether it was the second one.
        """
        thread = threading.get_ident()
        self._given[thread] = half
        try:
            yield
        finally:
            del self._given[thread]

    def look(self, latent: Tensor) -> Tensor:
        """Set :attr:`which` for a call with these latents, and give its value for this thread."""
        which = BOTH * holds_twice(latent).to(self.which.device) if self.pairs == "batched" else self._in_turn(latent)
        self.which.copy_(which)
        return which

    def _in_turn(self, latent: Tensor) -> Tensor:
        """The second half if the call before had the same latents and was the first."""
        now = torch.stack([latent.float().sum(), latent.float().square().sum()]).to(self.seen.device)
        if torch.compiler.is_compiling():
            which = _half(now, self.seen, self.which)
            self.seen.copy_(now)
            return which
        thread = threading.get_ident()
        which = _half(now, *self._calls.get(thread, (now * torch.nan, self.which)))  # NaN equals nothing
        self._calls[thread] = now, which
        return which

    def _half_of(self, latent: Tensor | None) -> Tensor:
        """The half that a call computes: the given one, or what its latents say; that of the call before without latents."""
        given = None if torch.compiler.is_compiling() else self._given.get(threading.get_ident())
        if given is not None:
            return self.which.copy_(torch.full_like(self.which, given)).clone()
        return self.which if latent is None else self.look(latent)

    def tick(self, timestep: Tensor | float, latent: Tensor | None = None) -> None:
        """Follow a call with this timestep: a number, one per clip, or one per token.

        Args:
            latent: of the call, where the halves of guidance are told apart by it.
        """
        times = torch.as_tensor(timestep, device=self.timesteps.device).float().reshape(-1)
        now = times.amax()  # frames given as a condition carry timestep 0
        distance = (self.timesteps - now).abs()
        slot = distance.argmin()
        stored = (distance.amin() <= TOLERANCE * now.abs()) & (times == now).all() & (self.tables and not self.adapted)
        protected = self.protects.index_select(0, slot.reshape(1))[0] if self.protected_slots else self.protected
        self.slot.copy_(slot)
        self.stored.copy_(stored)
        self.protected.copy_(protected)
        which = self._half_of(latent)
        if torch.compiler.is_compiling():
            self._now = {}
        else:
            self._now[threading.get_ident()] = [slot, stored, protected, which]
            self._timestep, self._mixed = float(now), bool((times != now).any())

    def now(self, group: int = 0) -> Moment:
        """This thread's call in Python values, as layers of a group see it; read once per call."""
        thread = threading.get_ident()
        kept = self._now.get(thread)
        if isinstance(kept, tuple):
            return kept[group]
        moments = self._moments(*(kept or self.state))  # autograd recomputes in threads of its own
        if kept is not None:
            self._now[thread] = moments
        return moments[group]

    @property
    def reads_stored(self) -> bool:
        """Whether all layers compute this thread's call in the bits that they store."""
        return all(self.now(group).widths == AS_STORED for group in range(1 + len(self.apart)))

    @property
    def state(self) -> list[Tensor]:
        """The same as tensors, for graphs that read them when they run."""
        return [self.slot, self.stored, self.protected, self.which]

    def follow(self, state: Sequence[Tensor]) -> None:
        """Answer :meth:`now` with the :attr:`state` of a compiled graph: :meth:`tick` is a part of it, and keeps no Python value."""
        self._now[threading.get_ident()] = self._moments(*state)

    def _moments(self, slot: Tensor, stored: Tensor, protected: Tensor, which: Tensor) -> tuple[Moment, ...]:
        """One for every group of layers."""
        number, protects = int(slot), bool(protected) and bool(self.protected_slots)
        moment = Moment(number, bool(stored), protects, int(which) if self.pairs else ANY)
        return tuple(moment._replace(widths=self.at(number, group)) for group in range(1 + len(self.apart)))

    def fall_back(self) -> None:
        """Say once that a table of outputs is not used because the current timestep is not in it."""
        if self._told or not self.tables:
            return
        why = "is not the only one of its call" if self._mixed else f"is none of the {len(self.timesteps)} in the table"
        why = "meets an adapter that changes the table" if self.adapted else why
        logger.warning("timestep %g %s: temporal layers are computed", self._timestep, why)
        self._told = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Clock:
        """``.to(bfloat16)`` moves a clock and leaves its numbers alone: 999 would become 1000."""
        return super()._apply(keeping_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return f"slots={len(self.timesteps)}"


def _half(now: Tensor, seen: Tensor, before: Tensor) -> Tensor:
    """Half of a guidance pair, by what is seen of the latents now and in the call before, and by what that call was."""
    again = (now == seen.to(now.device)).all() & (before.to(now.device) == FIRST)
    return torch.where(again, SECOND, FIRST)


def holds_twice(latent: Tensor) -> Tensor:
    """Whether a batch holds the same latents twice, as guidance in one call does: 0-d bool."""
    count, odd = divmod(len(latent), 2)
    return (latent[:count] == latent[count:]).all() if count and not odd else torch.zeros((), dtype=torch.bool, device=latent.device)


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``Module.to`` and its kin do to a tensor, without the change of dtype: for numbers that a cast would destroy."""

    def moved(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        return new if new.dtype == tensor.dtype else tensor.to(new.device)

    return moved


def timestep_reader(denoiser: nn.Module, argument: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """A function that reads the timestep (or another argument) out of ``(args, kwargs)`` of a denoiser call; None if it has none."""
    parameters = list(inspect.signature(denoiser.forward).parameters)
    return functools.partial(_read, argument, parameters.index(argument))


def _read(argument: str, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs.get(argument, args[position] if len(args) > position else None)


def attach(denoiser: nn.Module, clock: Clock, argument: str) -> RemovableHandle:
    """Make the clock a part of the denoiser, ticked before every call; the timestep of a call is called ``argument``.

    The hook finds the clock through the module it is called for, so a deep copy of the denoiser ticks its own copy.
    """
    clock.argument, clock.home = argument, weakref.ref(denoiser)
    denoiser.add_module(NAME, clock)
    latent = timestep_reader(denoiser, clock.latent) if clock.pairs and clock.latent else None
    before = functools.partial(_before, timestep_reader(denoiser, argument), latent)
    return denoiser.register_forward_pre_hook(before, with_kwargs=True)


def _before(read: Callable[..., Any], latent: Callable[..., Any] | None, module: nn.Module, args: Any, kwargs: Any) -> None:
    if (timestep := read(args, kwargs)) is not None:
        getattr(module, NAME).tick(timestep, None if latent is None else latent(args, kwargs))
