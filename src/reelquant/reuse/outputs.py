"""Blocks that are wired in any way, like those of a UNet with its skip connections. What is kept is the output of every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from reelquant.reuse.history import kind
from reelquant.reuse.stretch import Slot, StandIn
from reelquant.reuse.trajectory import Trajectory


class Output(StandIn):
    """A block whose output is kept whole: the skip connections that a UNet's block gives are a part of it.

    Copies are kept and given, because some blocks write into what they take (FreeU scales the features of a UNet in place).

    ``Trajectory.notes`` has two kinds of entries, each by the number of the call: what the stretch took when it was last computed, and
    how the output of a block is made of tensors.
    """

    def fits(self, trajectory: Trajectory, taken: Mapping[Slot, Any]) -> bool:
        return trajectory.notes.get(("entered", trajectory.call)) == _kinds(taken)

    def _name(self) -> tuple[str, int]:
        """Of what this call of the block gives: some blocks run more than once in a call of the denoiser."""
        facts = self.stretch.running.facts
        facts[self.name] = number = facts.get(self.name, -1) + 1
        return self.name, number

    def reused(self, taken: Mapping[Slot, Any]) -> Any:
        name, trajectory = self._name(), self.stretch.trajectory
        history = self.stretch.history(name)
        if history is None:
            raise self.refusal(f"'{self.name}' runs more often in one step than in another")
        leaves, layout = trajectory.notes[name, trajectory.call]
        tensors = (tensor.clone() for tensor in self.stretch.expected(history))
        return tree_unflatten([next(tensors) if leaf is Tensor else leaf for leaf in leaves], layout)

    def kept(self, taken: Mapping[Slot, Any], args: Any, kwargs: Any) -> Any:
        name, trajectory = self._name(), self.stretch.trajectory
        output = self.computed(args, kwargs)
        leaves, layout = tree_flatten(output)
        trajectory.notes[name, trajectory.call] = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves], layout
        self.stretch.keep(name, [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)])
        if self.last:
            trajectory.notes["entered", trajectory.call] = _kinds(self.stretch.running.entered)
        return output


def _kinds(taken: Mapping[Slot, Any]) -> list[Any]:
    """Shapes, dtypes and devices of the tensors that a block takes."""
    return [kind(leaf) for leaf in tree_leaves(dict(taken)) if isinstance(leaf, Tensor)]
