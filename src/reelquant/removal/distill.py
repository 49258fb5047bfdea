"""Train a denoiser on recorded calls of what it was, so that it gives the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from reelquant._errors import RecipeError
from reelquant.formats.criteria import nmse
from reelquant.models.sampling import sample
from reelquant.observe import RecordedCall, Recording
from reelquant.reconstruct.error import HELD_OUT, output_error
from reelquant.reconstruct.frame_relation import frame_axis
from reelquant.removal.kept import Kept

__all__ = ["HELD_OUT", "Distillation", "mean_error", "record"]


def record(pipe: Any, model: nn.Module, prompts: Sequence[Any], count: int, *, seed: int, **call: Any) -> Recording:
    """Calls of a denoiser while the pipeline samples, arguments and outputs, evenly from all of them.

    Args:
        count: how many to keep, at most.
        seed: of the first clip.
        call: arguments of the pipeline call.
    """
    calls = Recording()
    handle = model.register_forward_hook(lambda _, args, kwargs, output: calls.append(RecordedCall(args, kwargs, output)), with_kwargs=True)
    try:
        sample(pipe, prompts, seed=seed, output="latent", **call)
    finally:
        handle.remove()
    if len(calls) > count:
        calls.keep([round(place) for place in torch.linspace(0, len(calls) - 1, count).tolist()])
    return calls


def again(model: nn.Module, call: RecordedCall) -> Any:
    """What the denoiser as it is now gives for a recorded call."""
    return model(*call.args, **call.kwargs)


@torch.no_grad()
def mean_error(model: nn.Module, calls: Sequence[RecordedCall], numbers: Sequence[int]) -> float:
    """Mean over calls of squared error over variance of the recorded output, unitless."""
    return float(torch.stack([output_error(again(model, calls[number]), calls[number].output) for number in numbers]).mean())


@dataclass(frozen=True)
class Distillation:
    """How what is left is trained.

    The error of a call is that of its output, and ``motion`` times that of the differences of neighbouring frames, both over the variance
    of what was recorded.

    Attributes:
        iterations: steps of Adam, one recorded call each; 0 trains nothing.
        rate: its learning rate, which falls to zero linearly.
        motion: weight of the differences of frames.
        seed: of the order of the calls.

    Paper: VDMini (arXiv 2411.18375), losses for content and motion. Deviations: the recorded output of the whole denoiser is the target
    (theirs: features of its blocks, too); motion is a squared error of differences of frames (theirs: a discriminator that looks at
    several frames); all weights of the blocks are trained on few recorded calls (theirs: days on clips).
    """

    iterations: int = 300
    rate: float = 3e-4
    motion: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 0 or not 0 < self.rate < math.inf or not 0 <= self.motion < math.inf:
            raise RecipeError(
                "training needs iterations >= 0, a finite rate > 0 and a finite motion >= 0, "
                f"got {self.iterations}, {self.rate} and {self.motion}"
            )

    def train(
        self,
        model: nn.Module,
        parts: nn.Module,
        calls: Sequence[RecordedCall],
        numbers: Sequence[int],
        told: Callable[[], None],
        kept: Kept | None = None,
    ) -> None:
        """Train the parameters of some parts of a model; which of its parameters want gradients is as before afterwards.

        Args:
            parts: whose parameters are trained.
            calls: recorded calls, of which ``numbers`` are trained on.
            told: is told of every iteration.
            kept: where a run that was stopped goes on from.
        """
        wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.requires_grad_(False)
        parts.requires_grad_(True)
        optimizer = torch.optim.Adam(parts.parameters(), self.rate)
        done = _gone_on(parts, optimizer, kept)
        picks = torch.randint(len(numbers), (self.iterations,), generator=torch.Generator().manual_seed(self.seed)).tolist()
        try:
            with torch.enable_grad():
                for iteration, pick in enumerate(picks):
                    if iteration < done:
                        told()
                        continue
                    call = calls[numbers[pick]]
                    loss = self.loss(model, again(model, call), call.output)
                    optimizer.param_groups[0]["lr"] = self.rate * (1 - iteration / self.iterations)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    if kept is not None:
                        kept.trained(iteration + 1, parts.state_dict(), optimizer, last=iteration + 1 == self.iterations)
                    told()
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(wanted[name])
                parameter.grad = None

    def loss(self, model: nn.Module, found: Any, wanted: Any) -> Tensor:
        """Of one call: 0-d."""
        error, axis = output_error(found, wanted), frame_axis(model, wanted)
        if axis is None or not self.motion:
            return error
        one, other = (next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)) for output in (found, wanted))
        return error if one.shape[axis] < 2 else error + self.motion * nmse(other.diff(dim=axis), one.diff(dim=axis))


@torch.no_grad()
def _gone_on(parts: nn.Module, optimizer: torch.optim.Optimizer, kept: Kept | None) -> int:
    """Take weights and moments of a run that was stopped; how many iterations it did."""
    known = None if kept is None else kept.training()
    if known is None:
        return 0
    parts.load_state_dict(known["weights"])
    optimizer.load_state_dict(known["optimizer"])
    return int(known["iteration"])
