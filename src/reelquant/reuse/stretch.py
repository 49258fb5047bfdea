"""What the blocks of a stretch share, and how a block is taken over: each has a stand-in for its forward, which decides whether it runs."""

from __future__ import annotations

import functools
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant.reuse.criteria import CRITERIA, Seen
from reelquant.reuse.history import History
from reelquant.reuse.schedule import TOLERANCE, Schedule
from reelquant.reuse.trajectory import Trajectory

Slot = int | str
"""Where a block takes a tensor: a position or a keyword."""
Watcher = Callable[[Trajectory, Any, tuple[Tensor, ...]], None]
"""Hears what is kept: the trajectory, what it belongs to, the tensors."""


SEEN = "the signal of the criterion"
"""A note of a trajectory, by the number of the call: :class:`reelquant.reuse.criteria.Seen`."""


@dataclass(eq=False)
class Pass:
    """One way through the stretch.

    Attributes:
        entered: what the first block took.
        reuses: whether the stretch stays uncomputed.
        facts: what members note on the way.
    """

    entered: Mapping[Slot, Any] = field(default_factory=dict)
    reuses: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


class _Now(threading.local):
    """What a thread knows. ``running`` is the pass that it is in; None where blocks are computed and nothing is kept."""

    trajectory: Trajectory | None = None
    running: Pass | None = None


class Stretch:
    """What the blocks of a stretch share. A copy starts with nothing to reuse."""

    def __init__(
        self,
        schedule: Schedule,
        order: int,
        fitted: Sequence[Sequence[float]] = (),
        threshold: float = 0.0,
        criterion: str = "change",
        *,
        rounded: bool = False,
    ) -> None:
        self.schedule, self.order, self.fitted, self.rounded = schedule, order, tuple(fitted), rounded
        self.threshold, self.criterion = threshold, criterion
        self.now = _Now()
        self.counted: Counter[tuple[str, int]] = Counter()  # passes that were computed or reused, and at which step
        self.watcher: Watcher | None = None

    def __reduce__(self) -> Any:
        options = {"threshold": self.threshold, "criterion": self.criterion, "rounded": self.rounded}
        return functools.partial(Stretch, **options), (self.schedule, self.order, self.fitted)

    @property
    def trajectory(self) -> Trajectory:
        """That of the running pass."""
        assert self.now.trajectory is not None
        return self.now.trajectory

    @property
    def running(self) -> Pass:
        """The running pass."""
        assert self.now.running is not None
        return self.now.running

    def follow(self, timestep: float, latent: Tensor) -> Trajectory:
        """The denoiser is called: take the call into the trajectory, or begin another one."""
        now = self.now
        if now.trajectory is None or not now.trajectory.goes_on(timestep, latent):
            now.trajectory = Trajectory(timestep, latent)
        return now.trajectory

    def begin(self) -> None:
        """The stretch acts in this call of the denoiser."""
        if self._computes_always() and self.watcher is None:
            self.compute(self.now.trajectory)
        else:
            self.now.running = Pass()

    def _computes_always(self) -> bool:
        return not self.schedule.at and self.schedule.every == 1

    def rest(self, trajectory: Trajectory | None = None) -> None:
        """Another stretch acts in this call of the denoiser; without a trajectory the next call begins one."""
        self.now.trajectory, self.now.running = trajectory, None

    def compute(self, trajectory: Trajectory | None = None) -> None:
        """The denoiser is called, computes everything, and keeps nothing; without a trajectory the next call begins one."""
        self.rest(trajectory)
        self.counted["computed", 0 if trajectory is None else trajectory.step] += 1

    def enter(self, taken: Mapping[Slot, Any], fits: Callable[[Trajectory], bool]) -> None:
        """The first block is called: decide whether the stretch is computed."""
        running, trajectory = self.running, self.trajectory
        change = self._change(taken)
        computes = self.schedule.computes(trajectory.step, trajectory.timestep, trajectory.before) or change > self.threshold
        running.entered, running.reuses = taken, not computes and fits(trajectory)
        self.counted["reused" if running.reuses else "computed", trajectory.step] += 1
        if self.threshold:
            self._see(taken, change)

    def _change(self, taken: Mapping[Slot, Any]) -> float:
        """How much has changed since the stretch was last computed; 0 without a threshold."""
        seen = self.trajectory.notes.get((SEEN, self.trajectory.call)) if self.threshold else None
        return 0.0 if seen is None else seen.changed(CRITERIA[self.criterion].signal(taken, self.trajectory))

    def _see(self, taken: Mapping[Slot, Any], change: float) -> None:
        """Note the signal that the next step is compared with."""
        criterion, reuses = CRITERIA[self.criterion], self.running.reuses
        if reuses and not criterion.adds:
            return
        signal = criterion.signal(taken, self.trajectory).clone()  # a block may write into what it takes
        self.trajectory.notes[SEEN, self.trajectory.call] = Seen(signal, change if reuses else 0.0)

    def history(self, name: Any) -> History | None:
        """What this call of earlier steps gave, or None."""
        return self.trajectory.histories.get((name, self.trajectory.call))

    def expected(self, history: History) -> tuple[Tensor, ...]:
        """What a history lets expect at the running step."""
        now = self.trajectory.timestep
        return history.at(now, next((weights for time, *weights in self.fitted if abs(now - time) <= TOLERANCE * abs(time)), ()))

    def keep(self, name: Any, tensors: Sequence[Tensor]) -> None:
        """Keep what a computed call gave."""
        trajectory = self.trajectory
        trajectory.histories.setdefault((name, trajectory.call), History(self.order, rounded=self.rounded)).keep(
            trajectory.timestep, tensors
        )
        if self.watcher is not None:
            self.watcher(trajectory, name, tuple(tensors))

    def reset(self) -> None:
        """Forget every trajectory and all counts."""
        self.now = _Now()
        self.counted.clear()

    def leave(self) -> None:
        """The last block was called."""
        self.now.running = None


class StandIn(ABC):
    """Stands in for the forward of one block. It belongs to the block, so that a deep copy of the block has one of its own."""

    def __init__(self, name: str, block: nn.Module, stretch: Stretch, *, first: bool, last: bool) -> None:
        self.name, self.block, self.stretch, self.first, self.last = name, block, stretch, first, last
        self.before = vars(block).get("forward")  # of hooks that wrapped it earlier
        block.forward = self.placed

    @property
    def placed(self) -> Any:
        """What is put in the place of the block's forward."""
        return self.forward

    def remove(self) -> None:
        """Put the forward back. Hooks that wrapped this one later keep it, and it only calls the block from now on."""
        if vars(self.block).get("forward") != self.placed:
            return
        del self.block.forward
        if self.before is not None:
            self.block.forward = self.before

    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.stretch.now.running is None:
            return self.computed(args, kwargs)
        taken = dict(enumerate(args)) | kwargs
        if self.first:
            self.stretch.enter(taken, lambda trajectory: self.fits(trajectory, taken))
        output = self.reused(taken) if self.stretch.running.reuses else self.kept(taken, args, kwargs)
        if self.last:
            self.stretch.leave()
        return output

    def computed(self, args: Any, kwargs: Any) -> Any:
        """What the block gives."""
        return type(self.block).forward(self.block, *args, **kwargs) if self.before is None else self.before(*args, **kwargs)

    @abstractmethod
    def fits(self, trajectory: Trajectory, taken: Mapping[Slot, Any]) -> bool:
        """Whether what is kept can stand for this call; asked of the first block."""

    @abstractmethod
    def reused(self, taken: Mapping[Slot, Any]) -> Any:
        """What stands for the output of the block."""

    @abstractmethod
    def kept(self, taken: Mapping[Slot, Any], args: Any, kwargs: Any) -> Any:
        """What the block gives; the stretch keeps what later steps need of it."""

    def refusal(self, why: str) -> UnsupportedError:
        """An error for blocks that are wired in a way that this does not know."""
        return UnsupportedError(f"reuse 'blocks' needs blocks that hand tensors on unchanged: {why}; leave it out, or give another stretch")
