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
from reelquant.reconstruct.frame_relation import frame_axis, relation
from reelquant.reconstruct.input_scales import FOLLOWS, InputScales
from reelquant.reconstruct.parts import SCOPES, WHOLE
from reelquant.reconstruct.soft import SoftLayer, SoftWeight, harden, soften
from reelquant.reconstruct.through import GRADIENTS
from reelquant.sites import DenoiserMap
from reelquant.stages import BlockWork, LayerWork, Solution, Stage, StageSite

INPUTS = ("quantized", "float", "mixed")
TRAJECTORIES = ("float", "quantized")
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
        trajectory: whose calls are recorded: those of calibration with the ``float`` pipeline, or those of the ``quantized`` one, which
            samples the texts of calibration once more, as earlier stages left it. Targets are the float model's for the same arguments.
        iterations: steps of Adam for each part, one recorded call each.
        rate: its learning rate for what the stage trains.
        inputs: arguments that a part is trained on: those that the ``quantized`` parts before it give, those of the ``float`` model,
            or ``mixed``: some numbers of the one, the share ``drop`` of the other.
        drop: share of the inputs of layers that are not rounded while weights are learned, others in every iteration (QDrop).
        input_rate: learning rate of the logarithms of static scales of inputs; 0 leaves them as they are.
        follow: how these scales follow the denoising step, where a layer has a row of scales for each: ``each`` row by itself, ``all`` by
            the same factor, or ``fitted``: by a smooth function of the timestep, of which the layer stores the values.
        gradient: what moves them: the rounding ``step`` of every value (LSQ), or clipped values at the end of the ``range`` alone (PAMS).
        branch_rate: learning rate of the tensors of branches that may be trained (:attr:`reelquant.branches.Branch.learns`); 0 leaves them.
        relation: weight of the relations of frames beside the error (:mod:`reelquant.reconstruct.frame_relation`), with scope ``model``.
    """

    scope: str = "block"
    calls: int = 32
    trajectory: str = "float"
    iterations: int = 300
    rate: float = 0.05
    inputs: str = "quantized"
    drop: float = 0.0
    input_rate: float = 0.0
    follow: str = "each"
    gradient: str = "step"
    branch_rate: float = 0.0
    relation: float = 0.0
    name: ClassVar[str]

    def __post_init__(self) -> None:
        tables = (
            ("scope", SCOPES), ("inputs", INPUTS), ("follow", FOLLOWS), ("gradient", GRADIENTS), ("trajectory", TRAJECTORIES)
        )  # fmt: skip
        for name, known in tables:
            if (value := getattr(self, name)) not in known:
                raise RecipeError(f"unknown {name} '{value}' of {self.name}; {nearest(value, known)}")
        for name, least in (("calls", HELD_OUT), ("iterations", 1)):
            if (value := getattr(self, name)) < least:
                raise RecipeError(f"{name} of {self.name} is at least {least}, got {value}")
        if self.rate <= 0 or self.input_rate < 0:
            raise RecipeError(f"{self.name} needs rate > 0 and input_rate >= 0, got rate={self.rate}, input_rate={self.input_rate}")
        if self.branch_rate < 0 or self.relation < 0 or (self.relation and self.scope != WHOLE):
            raise RecipeError(
                f"{self.name} needs branch_rate >= 0 and relation >= 0, the latter with scope: model, because frames are those of the "
                f"denoiser's output; got branch_rate={self.branch_rate}, relation={self.relation}, scope={self.scope}"
            )
        if not 0 <= self.drop < 1:
            raise RecipeError(f"drop of {self.name} is a share in [0, 1), got {self.drop}")
        if self.inputs == "mixed" and not self.drop:
            raise RecipeError(f"inputs 'mixed' of {self.name} mixes by the share drop; write drop: 0.5, or inputs: quantized")

    @property
    def records(self) -> int:
        return self.calls

    @property
    def resamples(self) -> bool:
        return self.trajectory == "quantized"

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
        if reason := next(filter(None, (stage.untrainable for stage in site.before)), None):
            return f"{self.name} cannot train a layer {reason}; leave such layers out of 'on', or drop that step"
        if self.scope == "temporal" and role != "temporal":
            return f"scope 'temporal' of {self.name} trains layers with role temporal, not '{role}'; write on: role:temporal"
        return None

    @abstractmethod
    def weight_of(self, layer: QuantLayer, work: LayerWork, seed: int) -> SoftWeight:
        """The trained weight of a layer."""

    @abstractmethod
    def rated(self, soft: Sequence[SoftLayer]) -> Sequence[Rated]:
        """Parameters of weights with their learning rates."""

    def regularize(self, soft: Sequence[SoftLayer], done: float) -> None:
        """Add to the gradients those of what is wanted beside a small error, in units of the error at the start.

        ``done`` is the share of the iterations that are over.
        """
        del soft, done

    def solve_block(self, block: BlockWork) -> Mapping[str, Solution]:
        calls = block.calls(self.inputs != "float")
        trained, held_out = split(len(calls))
        if not trained:
            block.warn(f"codes stay as they are, because fewer than 2 of {self.calls} wanted calls were recorded")
            return {}
        block, soft = soften(
            block,
            functools.partial(self.weight_of, seed=block.seed),
            self._scales if self.input_rate else None,
            branches=self.branch_rate > 0,
        )
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
        groups = [group for group in (*self.rated(soft), self._rated_scales(soft), self._rated_branches(soft)) if group.parameters]
        optimizer = torch.optim.Adam([{"params": list(group.parameters), "lr": group.rate} for group in groups], fused=True)
        generator = torch.Generator().manual_seed(block.seed)
        picks = torch.randint(len(numbers), (self.iterations,), generator=generator).tolist()
        pick_call = self._dropping(block, soft, calls)
        harden(soft, False)
        with torch.enable_grad():
            for iteration, pick in enumerate(picks):
                call, done = pick_call(numbers[pick]), iteration / self.iterations
                loss = self._loss(block, call) / start
                for state, group in zip(optimizer.param_groups, groups, strict=True):
                    state["lr"] = group.rate * (1 - done) if group.falls else group.rate
                optimizer.zero_grad()
                loss.backward()
                self.regularize(soft, done)
                optimizer.step()
        harden(soft, True)

    def _loss(self, block: BlockWork, call: RecordedCall) -> Tensor:
        """Of one call: the error of the output, and how far the relations of its frames are from those in float."""
        found = block.output(call)
        error = output_error(found, call.output)
        axis = frame_axis(block.module, call.output) if self.relation else None
        return error if axis is None else error + self.relation * relation(found, call.output, axis)

    def _rated_branches(self, soft: Sequence[SoftLayer]) -> Rated:
        return Rated([parameter for layer in soft for parameter in layer.tensors.values()], self.branch_rate)

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
