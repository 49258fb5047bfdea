"""A stretch of blocks is computed at some steps; at the others, the change that it made last is added to its input.

Papers: FORA (arXiv 2407.01425) reuses the outputs of attention and feed-forward layers for several steps. Delta-DiT (arXiv 2406.01125)
reuses the change that a stretch of blocks makes, so that what earlier blocks computed at this step is not lost. Ours follows Delta-DiT.
Deviations: one stretch serves all steps (Delta-DiT moves it from the last to the first blocks in the course of a clip); every tensor that
flows through the blocks has a change of its own (hidden states and text); so has every call of a step (the two halves of guidance).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reelquant._errors import RecipeError, UnsupportedError
from reelquant.clock import timestep_reader
from reelquant.nn import get_module
from reelquant.reuse.reuse import Reuse
from reelquant.stages import ModelWork

Slot = int | str
"""Where a block takes a tensor: a position or a keyword."""


@dataclass(frozen=True)
class BlockReuse(Reuse):
    """Compute a stretch of consecutive blocks at every n-th step only.

    The stretch lies in the longest list of blocks. These are of one class, and each takes what the one before it gives. A call under
    autograd computes everything. A new trajectory begins when the timestep rises, or when the latents change in shape, dtype or device;
    after an interrupted clip, call ``reset()`` of what is installed. There is no rule for the last steps: a denoiser does not know how
    many are left.

    Attributes:
        every: the stretch is computed at every n-th step; 1 computes it always, bit for bit.
        first: so many steps at the start are always computed.
        stretch: the share of the blocks, from 0 to 1; blocks that lie partly inside belong to it.
    """

    every: int = 2
    first: int = 1
    stretch: tuple[float, float] = (0.25, 0.75)
    always: ClassVar[Mapping[str, Any]] = {"every": 1}

    def __post_init__(self) -> None:
        if self.every < 1 or self.first < 1:
            raise RecipeError(f"'every' and 'first' of reuse 'blocks' are steps, 1 or more, got {self.every} and {self.first}")
        if len(self.stretch) != 2 or not 0 <= self.stretch[0] < self.stretch[1] <= 1:
            raise RecipeError(f"'stretch' of reuse 'blocks' is a start and an end, like [0.25, 0.75], got {list(self.stretch)}")

    def computes(self, step: int) -> bool:
        """Whether this step, counted from 0, is computed in any case."""
        return step < self.first or (step - self.first + 1) % self.every == 0

    def facts(self, work: ModelWork) -> dict[str, Any]:
        """Paths of the blocks in execution order, and the names of two arguments of the denoiser."""
        timestep, latent = work.map.timestep_argument, work.map.latent_argument
        if timestep is None or latent is None:
            raise UnsupportedError(f"reuse 'blocks' follows the timestep, and '{work.component}' has none; use it for a denoiser")
        blocks = _list_of_blocks(work.denoiser, work.map.blocks)
        start, end = (share * len(blocks) for share in self.stretch)
        chosen = blocks[int(start) : int(-(-end // 1))]
        if len(chosen) < 2:
            raise UnsupportedError(
                f"reuse 'blocks' needs two blocks or more, and the stretch {list(self.stretch)} of the {len(blocks)} blocks of "
                f"{work.map.cls} holds {len(chosen)}; give a wider stretch"
            )
        return {"blocks": chosen, "timestep": timestep, "latent": latent}

    def install(self, model: nn.Module, facts: Mapping[str, Any]) -> InstalledBlocks:
        return InstalledBlocks(model, self, facts)


def _list_of_blocks(denoiser: nn.Module, blocks: Sequence[str]) -> list[str]:
    """The longest list of blocks.

    Raises:
        UnsupportedError: if its blocks differ in class, or others run between them.
    """
    homes = [name.rpartition(".")[0] for name in blocks]
    home = max(homes, key=homes.count, default="")
    own = [name for name in blocks if name.rpartition(".")[0] == home]
    kinds = sorted({type(get_module(denoiser, name)).__name__ for name in own})
    where = f"reuse 'blocks' does not work for {type(denoiser).__name__}"
    if len(kinds) != 1 or not isinstance(get_module(denoiser, home), nn.ModuleList):
        raise UnsupportedError(f"{where}: it needs a list of blocks of one class, and these are {', '.join(kinds) or 'none'}")
    first = blocks.index(own[0])
    if strange := [name for name in blocks[first : first + len(own)] if name not in own]:
        raise UnsupportedError(f"{where}: '{strange[0]}' runs between the blocks of '{home}'")
    return own


@dataclass(eq=False)
class _Change:
    """What a stretch added to its input: a tensor for each that flows through it, the slots where blocks take them, and whether a block
    gives a tensor instead of a tuple."""

    slots: tuple[Slot, ...]
    tensors: tuple[Tensor, ...]
    single: bool

    def fits(self, taken: Mapping[Slot, Any]) -> bool:
        """Whether a block takes tensors of the same kind."""
        return all(_kind(taken.get(slot)) == _kind(tensor) for slot, tensor in zip(self.slots, self.tensors, strict=True))

    def output(self, taken: Mapping[Slot, Any], *, add: bool) -> Any:
        """The output of a block that takes these tensors and is not computed."""
        pairs = zip(self.slots, self.tensors, strict=True)
        tensors = tuple(taken[slot] + tensor if add else taken[slot] for slot, tensor in pairs)
        return tensors[0] if self.single else tensors


def _kind(value: Any) -> Any:
    """Shape, dtype and device of a tensor."""
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else None


@dataclass(eq=False)
class _Trajectory:
    """Where a sampler is: timestep and latents of the last call, number of the step, number of the call in this step."""

    timestep: float
    latent: Tensor
    step: int = 0
    call: int = 0
    changes: dict[int, _Change] = field(default_factory=dict)  # by number of the call

    def goes_on(self, timestep: float, latent: Tensor) -> bool:
        """Take one more call, unless it belongs to another trajectory. Two calls of a step have the same latents."""
        again = timestep == self.timestep
        if timestep > self.timestep or _kind(latent) != _kind(self.latent) or (again and not torch.equal(latent, self.latent)):
            return False
        self.step, self.call = (self.step, self.call + 1) if again else (self.step + 1, 0)
        self.timestep, self.latent = timestep, latent
        return True


@dataclass(eq=False)
class _Pass:
    """One way through the stretch: what the first block took, what the block before gave and in which slots it is taken, and the change
    to add instead of computing."""

    entered: Mapping[Slot, Any] = field(default_factory=dict)
    given: tuple[Tensor, ...] = ()
    slots: tuple[Slot, ...] | None = None
    change: _Change | None = None


class _Now(threading.local):
    """What a thread knows. ``running`` is the pass that it is in; None where blocks are computed and nothing is kept."""

    trajectory: _Trajectory | None = None
    running: _Pass | None = None


class _Stretch:
    """What the blocks of a stretch share. A copy starts with nothing to reuse."""

    def __init__(self, stage: BlockReuse) -> None:
        self.stage, self.now, self.counted = stage, _Now(), Counter()

    def __reduce__(self) -> Any:
        return _Stretch, (self.stage,)

    def begin(self, timestep: float, latent: Tensor) -> None:
        """The denoiser is called."""
        now = self.now
        if now.trajectory is None or not now.trajectory.goes_on(timestep, latent):
            now.trajectory = _Trajectory(timestep, latent)
        step = now.trajectory.step
        if self.stage.computes(step) and self.stage.computes(step + 1):
            self.compute(now.trajectory)  # the next step needs no change
        else:
            now.running = _Pass()

    def compute(self, trajectory: _Trajectory | None = None) -> None:
        """The denoiser is called, computes everything, and keeps no change; without a trajectory the next call begins one."""
        self.now.trajectory, self.now.running = trajectory, None
        self.counted["computed"] += 1

    def enter(self, taken: Mapping[Slot, Any]) -> None:
        """The first block is called: decide whether the stretch is computed."""
        running, trajectory = self.now.running, self.now.trajectory
        assert running is not None and trajectory is not None
        change = None if self.stage.computes(trajectory.step) else trajectory.changes.get(trajectory.call)
        running.entered, running.change = taken, change if change is not None and change.fits(taken) else None
        self.counted["computed" if running.change is None else "reused"] += 1


class _Block:
    """Stands in for the forward of one block. It belongs to the block, so that a deep copy of the block has one of its own."""

    def __init__(self, name: str, block: nn.Module, stretch: _Stretch, *, first: bool, last: bool) -> None:
        self.name, self.block, self.stretch, self.first, self.last = name, block, stretch, first, last
        self.before = vars(block).get("forward")  # of hooks that wrapped it earlier
        block.forward = self.forward

    def remove(self) -> None:
        """Put the forward back. Hooks that wrapped this one later keep it, and it only calls the block from now on."""
        if vars(self.block).get("forward") != self.forward:
            return
        del self.block.forward
        if self.before is not None:
            self.block.forward = self.before

    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        now = self.stretch.now
        taken = dict(enumerate(args)) | kwargs
        running = now.running
        if running is None:
            return self._computed(args, kwargs)
        if self.first:
            self.stretch.enter(taken)
        change = running.change
        output = self._watched(running, args, kwargs) if change is None else change.output(taken, add=self.first)
        if self.last:
            now.running = None
        return output

    def _computed(self, args: Any, kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs) if self.before is None else self.before(*args, **kwargs)

    def _watched(self, running: _Pass, args: Any, kwargs: Any) -> Any:
        """The output; what flows from block to block is noted, and after the last block the change is kept."""
        if not self.first:
            self._check(running, dict(enumerate(args)) | kwargs)
        output = self._computed(args, kwargs)
        running.given = (output,) if isinstance(output, Tensor) else output
        if not isinstance(running.given, tuple) or not all(isinstance(one, Tensor) for one in running.given):
            kinds = ", ".join(type(one).__name__ for one in output) if isinstance(output, tuple) else type(output).__name__
            raise self._refusal(f"'{self.name}' gives {kinds}, and only tensors and tuples of tensors can be reused")
        if self.last:
            self._keep(running, single=isinstance(output, Tensor))
        return output

    def _check(self, running: _Pass, taken: Mapping[Slot, Any]) -> None:
        """Every tensor that the block before gave is taken, and always in the same slot."""
        places = [next((slot for slot, value in taken.items() if value is one), None) for one in running.given]
        if None in places or running.slots not in (None, tuple(places)):
            raise self._refusal(f"'{self.name}' does not take all that the block before it gives, in the same place as other blocks")
        running.slots = tuple(slot for slot in places if slot is not None)

    def _keep(self, running: _Pass, *, single: bool) -> None:
        slots, trajectory = running.slots, self.stretch.now.trajectory
        assert slots is not None and trajectory is not None
        entered = [running.entered.get(slot) for slot in slots]
        if len(entered) != len(running.given) or any(_kind(a) != _kind(b) for a, b in zip(entered, running.given, strict=True)):
            raise self._refusal(f"'{self.name}' does not give tensors like those that the first block of the stretch takes")
        changes = tuple(after - before for after, before in zip(running.given, entered, strict=True))
        trajectory.changes[trajectory.call] = _Change(slots, changes, single)

    def _refusal(self, why: str) -> UnsupportedError:
        return UnsupportedError(f"reuse 'blocks' needs blocks that hand tensors on unchanged: {why}; leave it out, or give another stretch")


class InstalledBlocks:
    """A stretch of blocks that is reused."""

    def __init__(self, model: nn.Module, stage: BlockReuse, facts: Mapping[str, Any]) -> None:
        self.read_timestep, self.read_latent = (timestep_reader(model, facts[key]) for key in ("timestep", "latent"))
        self.stretch, names = _Stretch(stage), facts["blocks"]
        ends = {"first": names[0], "last": names[-1]}
        self.blocks = [
            _Block(name, get_module(model, name), self.stretch, **{end: name == one for end, one in ends.items()}) for name in names
        ]
        self.handle = model.register_forward_pre_hook(self.begin, with_kwargs=True)

    @torch.compiler.disable
    def begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Before every call of the denoiser."""
        if getattr(model, "is_cache_enabled", False):
            raise UnsupportedError(f"{type(model).__name__} reuses blocks already; call disable_cache() to undo diffusers' own cache")
        timestep, latent = self.read_timestep(args, kwargs), self.read_latent(args, kwargs)
        if torch.is_grad_enabled() or timestep is None or not isinstance(latent, Tensor):
            self.stretch.compute()
        else:
            self.stretch.begin(float(torch.as_tensor(timestep).float().amax()), latent)

    def remove(self) -> None:
        """Leave the model as it was."""
        self.handle.remove()
        for block in reversed(self.blocks):
            block.remove()
        self.reset()

    def reset(self) -> None:
        """Forget every trajectory, its tensors and all counts."""
        self.stretch.now, self.stretch.counted = _Now(), Counter()

    def counts(self) -> dict[str, int]:
        """Passes through the stretch."""
        return {name: self.stretch.counted[name] for name in ("computed", "reused")}
