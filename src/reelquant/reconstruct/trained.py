"""The base class of reconstructions that train soft layers by gradients on recorded calls."""

from __future__ import annotations

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from reelquant._errors import RecipeError, nearest
from reelquant.nn import QuantLayer
from reelquant.observe import RecordedCall
from reelquant.reconstruct.drop import Drop
from reelquant.reconstruct.error import HELD_OUT, mean_error, output_error, split
from reelquant.reconstruct.input_scales import FOLLOWS, InputScales
from reelquant.reconstruct.parts import SCOPES, WHOLE
from reelquant.reconstruct.soft import SoftLayer, SoftWeight, harden, soften
from reelquant.reconstruct.through import GRADIENTS
from reelquant.sites import DenoiserMap
from reelquant.stages import BlockWork, LayerWork, Solution, Stage, StageSite

INPUTS = ("quantized", "float", "mixed")
PASSES = 3
"""An iteration goes forward and backward; the way back takes about twice as long."""


class Rated(NamedTuple):
    """Parameters that one learning rate serves.

    Attributes:
        rate: of Adam.
        falls: whether the rate falls to zero, linearly.
    """

    parameters: Sequence[nn.Parameter]
    rate: float
    falls: bool = True


@dataclass(frozen=True)
class Trained(Stage):
    """Lower the error of a part's output on recorded calls by Adam, for all layers of the part at once.

    The error of a call is the mean over the tensors of the output of squared error over variance of the float tensor. What was
    learned is dropped, with a warning, where it does not lower the error on the held-out calls.

    Attributes:
        scope: what is trained at once. ``layer``: each layer by itself. ``block``: each block of the denoiser; layers
            outside of blocks keep their codes. ``temporal``: each largest module whose quantizable layers all follow
            the timestep alone. ``model``: the denoiser as a whole.
        calls: denoiser calls to record, evenly over calibration; at least 4.
        iterations: steps of Adam for each part, one recorded call each.
        rate: its learning rate for what the stage trains.
        inputs: arguments that a part is trained on: those that the ``quantized`` parts before it give, those of the ``float`` model,
            or ``mixed``: some numbers of the one, the share ``drop`` of the other.
        drop: share of the inputs of layers that are not rounded while weights are learned, others in every iteration (QDrop).
        input_rate: learning rate of the logarithms of static scales of inputs; 0 leaves them as they are.
        follow: how these scales follow the denoising step, where a layer has a row of scales for each: ``each`` row by itself, ``all`` by
            the same factor, or ``fitted``: by a smooth function of the timestep, of which the layer stores the values.
        gradient: what moves them: the rounding ``step`` of every value (LSQ), or clipped values at the end of the ``range`` alone (PAMS).
    """

    scope: str = "block"
    calls: int = 32
    iterations: int = 300
    rate: float = 0.05
    inputs: str = "quantized"
    drop: float = 0.0
    input_rate: float = 0.0
    follow: str = "each"
    gradient: str = "step"
    name: ClassVar[str]

    def __post_init__(self) -> None:
        tables = (("scope", SCOPES), ("inputs", INPUTS), ("follow", FOLLOWS), ("gradient", GRADIENTS))
        for name, known in tables:
            if (value := getattr(self, name)) not in known:
                raise RecipeError(f"unknown {name} '{value}' of {self.name}; {nearest(value, known)}")
        for name, least in (("calls", HELD_OUT), ("iterations", 1)):
            if (value := getattr(self, name)) < least:
                raise RecipeError(f"{name} of {self.name} is at least {least}, got {value}")
        if self.rate <= 0 or self.input_rate < 0:
            raise RecipeError(f"{self.name} needs rate > 0 and input_rate >= 0, got rate={self.rate}, input_rate={self.input_rate}")
        if not 0 <= self.drop < 1:
            raise RecipeError(f"drop of {self.name} is a share in [0, 1), got {self.drop}")
        if self.inputs == "mixed" and not self.drop:
            raise RecipeError(f"inputs 'mixed' of {self.name} mixes by the share drop; write drop: 0.5, or inputs: quantized")

    @property
    def records(self) -> int:
        return self.calls

    @property
    def in_memory(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"scope 'model' of {self.name} trains all layers at once; write scope: block" if self.scope == WHOLE else None

    def own_calls(self, layers: int) -> int:
        del layers
        recorded = 2 * self.calls  # at most; a quarter is held out and measured twice, the rest is measured once
        return PASSES * self.iterations + recorded + recorded // HELD_OUT + 1

    def units(self, map_: DenoiserMap) -> Sequence[str]:
        return SCOPES[self.scope](map_)

    def supports(self, site: StageSite) -> str | None:
        role = site.layer.role
        if self.scope == "temporal" and role != "temporal":
            return f"scope 'temporal' of {self.name} trains layers with role temporal, not '{role}'; write on: role:temporal"
        return None

    @abstractmethod
    def weight_of(self, layer: QuantLayer, work: LayerWork, seed: int) -> SoftWeight:
        """The trained weight of a layer."""

    @abstractmethod
    def rated(self, soft: Sequence[SoftLayer]) -> Sequence[Rated]:
        """Parameters of weights with their learning rates."""

    def penalty(self, soft: Sequence[SoftLayer], done: float) -> Tensor | None:
        """What is added to the error, in units of the error at the start; ``done`` is the share of the iterations that are over."""
        del soft, done
        return None

    def solve_block(self, block: BlockWork) -> Mapping[str, Solution]:
        calls = block.calls(self.inputs != "float")
        trained, held_out = split(len(calls))
        if not trained:
            block.warn(f"codes stay as they are, because fewer than 2 of {self.calls} wanted calls were recorded")
            return {}
        block, soft = soften(block, functools.partial(self.weight_of, seed=block.seed), self._scales if self.input_rate else None)
        learning = {path: layer for path, layer in soft.items() if layer.learns}
        if not learning:
            block.warn(
                f"codes stay as they are, because {self.name} has nothing to train there: inputs are float, or ranged in the forward"
            )
            return {}
        before = mean_error(block, calls, held_out)
        self.train(block, list(soft.values()), calls, trained)
        if not mean_error(block, calls, held_out) < before:
            block.warn(f"codes stay as they are, because {self.name} does not lower the error on held-out calls")
            return {}
        return {path: dataclasses.replace(layer.solution(), solver=self.name) for path, layer in learning.items()}

    def _scales(self, scale: Tensor, work: LayerWork) -> InputScales:
        return InputScales(scale, work, self.follow, self.gradient)

    def train(self, block: BlockWork, soft: Sequence[SoftLayer], calls: Sequence[RecordedCall], numbers: Sequence[int]) -> None:
        """Train the soft layers on these calls; they are hard again afterwards."""
        start = max(mean_error(block, calls, numbers), torch.finfo(torch.float32).tiny)
        groups = [group for group in (*self.rated(soft), self._rated_scales(soft)) if group.parameters]
        optimizer = torch.optim.Adam([{"params": list(group.parameters), "lr": group.rate} for group in groups])
        generator = torch.Generator().manual_seed(block.seed)
        picks = torch.randint(len(numbers), (self.iterations,), generator=generator).tolist()
        pick_call = self._dropping(block, soft, calls)
        harden(soft, False)
        with torch.enable_grad():
            for iteration, pick in enumerate(picks):
                call, done = pick_call(numbers[pick]), iteration / self.iterations
                loss = output_error(block.output(call), call.output) / start
                if (penalty := self.penalty(soft, done)) is not None:
                    loss = loss + penalty
                for state, group in zip(optimizer.param_groups, groups, strict=True):
                    state["lr"] = group.rate * (1 - done) if group.falls else group.rate
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        harden(soft, True)

    def _rated_scales(self, soft: Sequence[SoftLayer]) -> Rated:
        return Rated([p for layer in soft if layer.scales is not None for p in layer.scales.parameters()], self.input_rate)

    def _dropping(self, block: BlockWork, soft: Sequence[SoftLayer], calls: Sequence[RecordedCall]) -> Any:
        """A function that gives the call of a number, once random dropping is set up."""
        if not self.drop:
            return calls.__getitem__
        drop = Drop(self.drop, block.seed)
        for layer in soft:
            layer.drop = drop
        if self.inputs != "mixed":
            return calls.__getitem__
        floats = block.calls(False)
        return lambda number: drop.call(calls[number], floats[number])
