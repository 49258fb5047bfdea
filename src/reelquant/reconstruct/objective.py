"""What training minimises on recorded calls, and the held-out error that decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reelquant.observe import RecordedCall
from reelquant.reconstruct.error import mean_error, output_error, split
from reelquant.reconstruct.paths import Path, paths, tensor_of
from reelquant.stages import BlockWork


class Objective(ABC):
    """An error of a part's outputs.

    Attributes:
        trained: numbers of the calls that train.
    """

    trained: Sequence[int]

    @abstractmethod
    def held_out_error(self) -> float:
        """Of the part as it is now, on calls that do not train."""

    @abstractmethod
    def begin(self) -> None:
        """Take the error of the part as it is now on the calls that train as the unit of losses."""

    @abstractmethod
    def loss(self, number: int, output: Any) -> Tensor:
        """The loss of an output that the part gives for a call that trains."""


class OfOutputs(Objective):
    """Squared error of each output over its variance (:func:`reelquant.reconstruct.error.output_error`); every call counts alike."""

    def __init__(self, block: BlockWork, calls: Sequence[RecordedCall]) -> None:
        self.block, self.calls, self.start = block, calls, 1.0
        self.trained, self.held_out = split(len(calls))

    def held_out_error(self) -> float:
        return mean_error(self.block, self.calls, self.held_out)

    def begin(self) -> None:
        self.start = max(mean_error(self.block, self.calls, self.trained), torch.finfo(torch.float32).tiny)

    def loss(self, number: int, output: Any) -> Tensor:
        return output_error(output, self.calls[number].output) / self.start


class OfPaths(Objective):
    """How far the errors of all calls of a run move its final latents.

    With the movement ``m_i`` that the error of call ``i`` causes (:class:`reelquant.reconstruct.paths.Path`), the error of a run is the
    mean of ``(sum_i m_i)^2 + sum_i m_i^2``: what is alike in all steps adds up, and what is not counts by itself. One call trains at a
    time; the movements of the others are those of the last time that they were computed. Runs are held out as a whole.
    """

    def __init__(self, block: BlockWork, calls: Sequence[RecordedCall], found: Sequence[Path]) -> None:
        self.block, self.calls, self.start = block, calls, 1.0
        trained, held_out = split(len(found))
        self.runs, self.others = [found[place] for place in trained], [found[place] for place in held_out]
        self.run_of = {number: run for run in self.runs for number in run.shares}
        self.trained = list(self.run_of)
        self.known: dict[int, Tensor] = {}

    def _moved(self, run: Path, number: int, output: Any) -> Tensor:
        return run.moved(number, tensor_of(output) - tensor_of(self.calls[number].output))

    @torch.no_grad()
    def _error(self, runs: Sequence[Path]) -> float:
        errors: list[float] = []
        for run in runs:
            moved = {number: self._moved(run, number, self.block.output(self.calls[number])) for number in run.shares}
            self.known |= moved
            errors.append(float(sum(moved.values(), torch.zeros(())).square().mean() + _alone(moved.values())))
        return sum(errors) / len(errors)

    def held_out_error(self) -> float:
        return self._error(self.others)

    def begin(self) -> None:
        self.start = max(self._error(self.runs), torch.finfo(torch.float32).tiny)

    def loss(self, number: int, output: Any) -> Tensor:
        run = self.run_of[number]
        moved = self._moved(run, number, output)
        rest = sum((self.known[other] for other in run.shares if other != number), torch.zeros(()))
        self.known[number] = moved.detach()
        return ((rest + moved).square().mean() + moved.square().mean()) / self.start


def _alone(moved: Any) -> Tensor:
    return torch.stack([one.square().mean() for one in moved]).sum()


def of_paths(block: BlockWork, calls: Sequence[RecordedCall]) -> Objective:
    """:class:`OfPaths` where runs were recorded whole, else :class:`OfOutputs`, with a warning."""
    if len(found := paths(calls)) > 1:
        return OfPaths(block, calls, found)
    block.warn(
        "every call counts alike, because no two runs of the sampler are recorded whole, or it is not a one-step sampler; raise calls"
    )
    return OfOutputs(block, calls)


OBJECTIVES = {"output": OfOutputs, "path": of_paths}
"""What training minimises: errors of outputs, or where they lead to (scope ``model``)."""
