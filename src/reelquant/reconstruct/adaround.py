"""Learned rounding: every weight takes one of two levels, so that the output of a part stays near that in float."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reelquant._errors import RecipeError, nearest
from reelquant.observe import RecordedCall
from reelquant.reconstruct.error import HELD_OUT, mean_error, output_error, split
from reelquant.reconstruct.parts import SCOPES
from reelquant.reconstruct.soft import SoftLayer, ordered, soften
from reelquant.sites import DenoiserMap
from reelquant.stages import BlockWork, Solution, Stage, StageSite

INPUTS = ("quantized", "float")
SHARPEST, SOFTEST = 2.0, 20.0
"""The last and the first exponent of the regularizer."""
PASSES = 3
"""An iteration goes forward and backward; the way back takes about twice as long."""


@dataclass(frozen=True)
class AdaRound(Stage):
    """Learn which of the two levels around it every weight takes, by gradients, for all layers of a part at once.

    A weight is ``low + h(v) * (high - low)``, with ``h`` the rectified sigmoid. Adam changes ``v`` alone and
    minimises the error of the part's output on recorded calls plus ``weight * mean(1 - |2 h - 1| ** beta)``, which
    pushes ``h`` to 0 or 1 while ``beta`` falls. The error of a call is the mean over the tensors of the output of
    squared error over variance of the float tensor. Then every weight takes its nearer level. Codes that do not lower
    the error on the held-out calls are dropped, with a warning.

    Attributes:
        scope: what is trained at once. ``layer``: each layer by itself. ``block``: each block of the denoiser; layers
            outside of blocks keep their codes. ``temporal``: each largest module whose quantizable layers all follow
            the timestep alone.
        calls: denoiser calls to record, evenly over calibration; at least 4.
        iterations: steps of Adam for each part, one recorded call each.
        rate: its learning rate.
        weight: of the regularizer. The error counts in units of the error that the part starts with. With few iterations it
            has to be strong: a weight that is undecided when they end is rounded without regard to the error.
        warmup: share of the iterations without the regularizer.
        inputs: arguments that a part is trained on: those that the ``quantized`` parts before it give, or those of
            the ``float`` model.

    Papers: AdaRound (arXiv 2004.10568); BRECQ (arXiv 2102.05426): blocks; TFMQ-DM (arXiv 2311.16503): temporal layers.
    Deviations: training starts near the codes of the solver (theirs: at the float weight), and a code that is further
    away stays one of the two candidates. Errors are normalised, per tensor by variance and in total by the starting
    error, so that one weight of the regularizer fits all parts. The bias follows the codes as the solver's
    ``correct_bias`` says. There are hundreds of iterations with a larger learning rate (theirs: 20,000 with 0.001).
    BRECQ weights errors by the Fisher information; this stage does not. TFMQ-DM trains all temporal layers as one
    part; here each module is one. BRECQ trains layers outside of blocks one by one; scope ``block`` leaves them. QDrop's
    random dropping of the inputs' rounding is left out.
    """

    scope: str = "block"
    calls: int = 32
    iterations: int = 300
    rate: float = 0.05
    weight: float = 300.0
    warmup: float = 0.2
    inputs: str = "quantized"

    def __post_init__(self) -> None:
        for name, known in (("scope", SCOPES), ("inputs", INPUTS)):
            if (value := getattr(self, name)) not in known:
                raise RecipeError(f"unknown {name} '{value}' of adaround; {nearest(value, known)}")
        for name, least in (("calls", HELD_OUT), ("iterations", 1)):
            if (value := getattr(self, name)) < least:
                raise RecipeError(f"{name} of adaround is at least {least}, got {value}")
        if self.rate <= 0 or self.weight < 0 or not 0 <= self.warmup < 1:
            raise RecipeError(
                "adaround needs rate > 0, weight >= 0 and warmup in [0, 1), "
                f"got rate={self.rate}, weight={self.weight}, warmup={self.warmup}"
            )

    @property
    def records(self) -> int:
        return self.calls

    def own_calls(self, layers: int) -> int:
        del layers
        recorded = 2 * self.calls  # at most; a quarter is held out and measured twice, the rest is measured once
        return PASSES * self.iterations + recorded + recorded // HELD_OUT + 1

    def units(self, map_: DenoiserMap) -> Sequence[str]:
        return SCOPES[self.scope](map_)

    def supports(self, site: StageSite) -> str | None:
        weight, role = site.specs.weight, site.layer.role
        for one in (weight.format, *weight.alternatives):
            if not ordered(one):
                return f"adaround needs weight codes in the order of their numbers (int4, uint4, power_4), got {one.name}"
        if self.scope == "temporal" and role != "temporal":
            return f"scope 'temporal' of adaround trains layers with role temporal, not '{role}'; write on: role:temporal"
        return None

    def solve_block(self, block: BlockWork) -> Mapping[str, Solution]:
        calls = block.calls(self.inputs == "quantized")
        trained, held_out = split(len(calls))
        if not trained:
            block.warn(f"codes stay as they are, because fewer than 2 of {self.calls} wanted calls were recorded")
            return {}
        block, soft = soften(block)
        before = mean_error(block, calls, held_out)
        self._train(block, list(soft.values()), calls, trained)
        if not mean_error(block, calls, held_out) < before:
            block.warn("codes stay as they are, because learned rounding does not lower the error on held-out calls")
            return {}
        return {path: dataclasses.replace(layer.harden(), solver="adaround") for path, layer in soft.items()}

    def _train(self, block: BlockWork, soft: Sequence[SoftLayer], calls: Sequence[RecordedCall], numbers: Sequence[int]) -> None:
        """Train the soft layers on these calls; they are hard again afterwards."""
        start = max(mean_error(block, calls, numbers), torch.finfo(torch.float32).tiny)
        optimizer = torch.optim.Adam([layer.v for layer in soft], lr=self.rate)
        generator = torch.Generator().manual_seed(block.seed)
        picks = torch.randint(len(numbers), (self.iterations,), generator=generator).tolist()
        _harden(soft, False)
        with torch.enable_grad():
            for iteration, pick in enumerate(picks):
                call = calls[numbers[pick]]
                loss = output_error(block.output(call), call.output) / start
                if (beta := self._beta(iteration)) is not None:
                    loss = loss + self.weight * undecided(soft, beta)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        _harden(soft, True)

    def _beta(self, iteration: int) -> float | None:
        """Exponent of the regularizer, which falls linearly; None during the warm-up."""
        done = iteration / self.iterations
        if done < self.warmup:
            return None
        return SHARPEST + (SOFTEST - SHARPEST) * (1 - (done - self.warmup) / (1 - self.warmup))


def _harden(soft: Sequence[SoftLayer], hard: bool) -> None:
    for layer in soft:
        layer.hard = hard


def undecided(soft: Sequence[SoftLayer], beta: float) -> Tensor:
    """Mean of ``1 - |2 h - 1| ** beta`` over the weights of all layers: 0 once each has chosen a level."""
    total = sum(((2 * layer.share - 1).abs().pow(beta).sum() for layer in soft), start=torch.zeros(()))
    return 1 - total / sum(layer.v.numel() for layer in soft)
