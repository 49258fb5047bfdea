"""Blocks that form a chain: each takes what the one before it gives. The change that the whole stretch made to its input is kept."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from reelquant.reuse.history import kind
from reelquant.reuse.stretch import Slot, StandIn
from reelquant.reuse.trajectory import Trajectory

CHANGE = "change"
"""The name of what a chain keeps."""
MISSING = ""
"""A slot that no block takes anything in."""


class Wiring(NamedTuple):
    """How tensors flow through a chain.

    Attributes:
        slots: where a block takes what the one before it gives, in the order in which that one gives it.
        single: whether a block gives a tensor instead of a tuple.
        last: which of them the last block gives; None stands for the others (the text, behind the last block of SD3).
    """

    slots: tuple[Slot, ...]
    single: bool
    last: tuple[bool, ...]


class Link(StandIn):
    """A block of a chain.

    At a reused step the first block gives its input plus the change that is expected of the whole stretch, and the others give what they
    take. ``Pass.facts`` holds the tensors that the block before gave (``given``) and the slots in which the next one takes them
    (``slots``); ``Trajectory.notes`` the wiring, by the number of the call.
    """

    def fits(self, trajectory: Trajectory, taken: Mapping[Slot, Any]) -> bool:
        history = self.stretch.history(CHANGE)
        if history is None:
            return False
        wiring = trajectory.notes[trajectory.call]
        slots = itertools.compress(wiring.slots, wiring.last)
        return all(kind(taken.get(slot)) == kept for slot, kept in zip(slots, history.kinds, strict=True))

    def reused(self, taken: Mapping[Slot, Any]) -> Any:
        trajectory = self.stretch.trajectory
        wiring = trajectory.notes[trajectory.call]
        tensors = [taken[slot] for slot in wiring.slots]
        if self.first:
            history = self.stretch.history(CHANGE)
            assert history is not None
            changes = iter(self.stretch.expected(history))
            tensors = [tensor + next(changes) if there else tensor for tensor, there in zip(tensors, wiring.last, strict=True)]
        if self.last:
            tensors = [tensor if there else None for tensor, there in zip(tensors, wiring.last, strict=True)]
        return tensors[0] if wiring.single else tuple(tensors)

    def kept(self, taken: Mapping[Slot, Any], args: Any, kwargs: Any) -> Any:
        facts = self.stretch.running.facts
        if not self.first:
            self._check(facts, taken)
        output = self.computed(args, kwargs)
        facts["given"] = given = (output,) if isinstance(output, Tensor) else output
        if not isinstance(given, tuple) or not all(isinstance(one, Tensor) or (self.last and one is None) for one in given):
            kinds = ", ".join(type(one).__name__ for one in output) if isinstance(output, tuple) else type(output).__name__
            raise self.refusal(f"'{self.name}' gives {kinds}, and only tensors and tuples of tensors can be reused")
        if self.last:
            self._keep(facts, single=isinstance(output, Tensor))
        return output

    def _check(self, facts: dict[str, Any], taken: Mapping[Slot, Any]) -> None:
        """Every tensor that the block before gave is taken, and always in the same slot."""
        places = [next((slot for slot, value in taken.items() if value is one), None) for one in facts["given"]]
        if None in places or facts.get("slots") not in (None, tuple(places)):
            raise self.refusal(f"'{self.name}' does not take all that the block before it gives, in the same place as other blocks")
        facts["slots"] = tuple(places)

    def _keep(self, facts: dict[str, Any], *, single: bool) -> None:
        given, slots = facts["given"], facts.get("slots") or _alike(facts["given"], self.stretch.running.entered)
        wiring = Wiring(slots, single, tuple(one is not None for one in given))
        entered = [self.stretch.running.entered.get(slot) for slot in wiring.slots]
        if len(entered) != len(given) or any(kind(a) != kind(b) for a, b in zip(entered, given, strict=True) if b is not None):
            raise self.refusal(f"'{self.name}' does not give tensors like those that the first block of the stretch takes")
        trajectory = self.stretch.trajectory
        trajectory.notes[trajectory.call] = wiring
        self.stretch.keep(CHANGE, [after - before for after, before in zip(given, entered, strict=True) if after is not None])


def _alike(given: Sequence[Any], taken: Mapping[Slot, Any]) -> tuple[Slot, ...]:
    """Where a single block takes what it gives: for each tensor the first slot with one of its form, in the order of the slots."""
    left = {slot: kind(value) for slot, value in taken.items() if isinstance(value, Tensor)}
    found: list[Slot] = []
    for one in given:
        slot = next((slot for slot, form in left.items() if form == kind(one)), MISSING)
        left.pop(slot, None)
        found.append(slot)
    return tuple(found)
