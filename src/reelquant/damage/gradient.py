"""All changes at once from one backward pass through a whole trajectory: how far each rounding error moves the final latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from reelquant._errors import UnsupportedError
from reelquant.allocate.table import EVERY, Damage, Part
from reelquant.clock import BOTH
from reelquant.damage.kept import Kept
from reelquant.damage.rounding import Steps, input_rounding, rounded_weight
from reelquant.damage.scene import HALVES, Scene, Target, following
from reelquant.evidence import bootstrap

PROBES = 3  # backward passes for every clip

Cut = tuple[Steps, str | None]  # steps and half of guidance that count; None for all


def by_gradient(
    scene: Scene, target: Target, weights: Sequence[str], inputs: Sequence[str], ranges: Sequence[tuple[int, int]], kept: Kept
) -> list[Damage]:
    """Damage of every format of every weight and input to the final latents, to first order.

    An error ``d`` of a weight, the same at all steps, moves the final latents by ``J d``. For a random vector ``v`` of signs,
    ``E (v^T J d)^2 = |J d|^2``, and ``v^T J`` is one backward pass through the sampler, for all layers and formats together. Each call of
    the denoiser is computed again on the way back, so that the activations of one call are held at a time (those of all inputs if
    formats of inputs are asked for). Rounding errors of different rows of a weight, and those of inputs at different positions and calls,
    are taken to be independent: squares are summed row by row, which varies far less from one ``v`` to the next than the square of the
    sum. The result is over the variance of the latents.

    Source: the Gauss-Newton matrix with Hutchinson's estimator, as HAWQ-V2 (arXiv 1911.03852) uses it for the trace of the Hessian.
    Deviations: the real rounding error of each format takes the place of the trace times its squared norm, the loss is the squared error
    of the final latents (which needs no label), and inputs are treated alike. LRP-QViT (arXiv 2401.11243) asks gradients, too, for the
    share of a layer in the output; here they are asked for the error.

    Raises:
        UnsupportedError: if no gradient comes back through the sampler.
    """
    scene.progress.phase(f"{target.component}: gradients", len(scene.prompts) * PROBES)
    deltas = _Deltas(target, weights)
    cuts: list[Cut] = [(None, None), *((steps, None) for steps in ranges)]
    halved = target.halves and not any(call.half == BOTH for call in target.calls)
    cuts += [(None, half) for half in HALVES] if halved else []
    cuts += [((step, step), None) for step in range(len(target.timesteps))] if inputs else []
    values = []
    words = f"weights {', '.join(weights)}, inputs {', '.join(inputs)}, {len(ranges)} ranges"
    for clip in range(len(scene.prompts)):
        for probe in range(PROBES):

            def measured(clip: int = clip, probe: int = probe) -> list[float]:
                return _Pass(scene, target, deltas, tuple(inputs)).run(clip, probe, cuts).flatten().tolist()

            values.append(kept.of(f"gradient, {target.component}, clip {clip}, probe {probe}, {words}", measured))
            scene.progress.advance()
    found = np.array(values).reshape(len(values), len(cuts), len(target.layers), -1)
    columns: list[tuple[Part, str]] = [*(("weight", one) for one in weights), *(("input", one) for one in inputs)]  # type: ignore[list-item]
    return _rows(target, columns, cuts, found, singles=len(target.timesteps) if inputs else 0)


def _rows(target: Target, columns: Sequence[tuple[Part, str]], cuts: Sequence[Cut], found: np.ndarray, singles: int) -> list[Damage]:
    """Rows of all layers, and of all inputs together at single steps, which are the last cuts."""
    rows = []
    for number, (steps, half) in enumerate(cuts[: len(cuts) - singles]):
        for place, layer in enumerate(target.layers):
            for column, (part, written) in enumerate(columns):
                mean = bootstrap(found[:, number, place, column].tolist(), resamples=200)
                values = (mean.mean, mean.low, mean.high)
                rows.append(Damage(target.component, layer.name, part, written, "gradient", *values, steps, half))
    for number, (steps, _) in enumerate(cuts[len(cuts) - singles :], len(cuts) - singles):
        for column, (part, written) in enumerate(columns):
            if part == "input":
                mean = bootstrap(found[:, number, :, column].sum(1).tolist(), resamples=200)
                rows.append(Damage(target.component, EVERY, part, written, "gradient", mean.mean, mean.low, mean.high, steps))
    return rows


class _Deltas:
    """Rounding errors of weights, computed when they are first asked for."""

    def __init__(self, target: Target, formats: Sequence[str]) -> None:
        self.target, self.formats = target, formats
        self._known: dict[str, list[Tensor]] = {}

    def of(self, layer: str) -> list[Tensor]:
        """Of a layer, one for each format."""
        if layer not in self._known:
            weight = self.target.module(layer).weight.detach()
            self._known[layer] = [(rounded_weight(self.target, layer, written) - weight).flatten(1) for written in self.formats]
        return self._known[layer]


@dataclass(eq=False)
class _Pass:
    """One trajectory forward and back.

    Attributes:
        moved: for every call, in backward order: its step and half, what the error of each row of each layer moves ``[formats, rows]``,
            and the squares of what inputs move ``[formats]``.
    """

    scene: Scene
    target: Target
    deltas: _Deltas
    inputs: tuple[str, ...]
    moved: list[tuple[int, int, list[Tensor], list[Tensor]]] = field(default_factory=list)
    _now: tuple[int, int] | None = None

    def run(self, clip: int, probe: int, cuts: Sequence[Cut]) -> np.ndarray:
        """Damages ``[cuts, layers, formats of weights and then of inputs]``."""
        names = [layer.name for layer in self.target.layers]
        squares = {name: torch.zeros(len(self.inputs), dtype=torch.float64) for name in names}
        with ExitStack() as stack:
            weights = stack.enter_context(_weights_asked(self.scene.pipe, self.target))
            stack.enter_context(following(self.scene.targets))
            stack.enter_context(_checkpointed(self.target.denoiser))
            stack.enter_context(_inputs_asked(self.target, self.inputs, squares))

            def flush() -> None:
                if self._now is not None:
                    rows = [self._by_rows(name, weight.grad) for name, weight in weights.items()]
                    self.moved.append((*self._now, rows, [squares[name].clone() for name in names]))
                for weight in weights.values():
                    weight.grad = None
                for one in squares.values():
                    one.zero_()

            stack.callback(self.target.denoiser.register_forward_hook(self._marking(flush)).remove)
            latents = self.scene.with_gradients(clip)
            if not latents.requires_grad:
                raise UnsupportedError(
                    f"no gradient comes back through the sampler of {type(self.scene.pipe).__name__} to '{self.target.component}'; "
                    "measure by trajectory or noise"
                )
            generator = torch.Generator().manual_seed(1000 * clip + probe)
            signs = torch.randint(0, 2, latents.shape, generator=generator).to(latents.device, latents.dtype) * 2 - 1
            latents.backward(signs)
            flush()
            self._now = None
        scale = 1 / max(float(latents.detach().float().var(correction=0)) * latents.numel(), 1e-30)
        return np.stack([self._cut(cut, len(names)) for cut in cuts]) * scale

    def _marking(self, flush: Callable[[], None]) -> Callable[..., None]:
        """Marks the output of every call: on the way back, whatever came before belongs to later calls."""

        def after(module: nn.Module, args: Any, output: Any) -> None:
            place = (self.target.step, self.target.half)
            leaf = next((one for one in tree_leaves(output) if isinstance(one, Tensor) and one.requires_grad), None)

            def reached(grad: Tensor) -> None:
                flush()
                self._now = place

            if leaf is not None:
                leaf.register_hook(reached)

        return after

    def _by_rows(self, name: str, grad: Tensor | None) -> Tensor:
        """What the error of each row moves, ``[formats, rows]``."""
        deltas = self.deltas.of(name)
        if grad is None:
            return torch.zeros(len(deltas), len(deltas[0]) if deltas else 0)
        return torch.stack([(grad.flatten(1).float() * delta.float()).sum(1) for delta in deltas])

    def _cut(self, cut: Cut, layers: int) -> np.ndarray:
        steps, half = cut
        wanted = None if half is None else HALVES[half]
        mine = [one for one in self.moved if (steps is None or steps[0] <= one[0] <= steps[1]) and wanted in (None, one[1])]
        found = np.zeros((layers, len(self.deltas.formats) + len(self.inputs)))
        for layer in range(layers if mine else 0):
            rows = torch.stack([rows[layer] for _, _, rows, _ in mine]).double().sum(0)
            inputs = torch.stack([squares[layer] for _, _, _, squares in mine]).sum(0)
            found[layer] = torch.cat([rows.square().sum(1), inputs]).numpy()
        return found


@contextmanager
def _weights_asked(pipe: Any, target: Target) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, a backward pass fills the gradients of the layers' weights, and of no other parameter: the weights by layer."""
    modules = [one for one in pipe.components.values() if isinstance(one, nn.Module)]
    every = {id(parameter): parameter for module in [*modules, target.denoiser] for parameter in module.parameters()}.values()
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in every]
    for parameter in every:
        parameter.requires_grad_(False)
    weights = {layer.name: target.module(layer.name).weight for layer in target.layers}
    for weight in weights.values():
        weight.grad = None
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        for parameter, asked, grad in before:
            parameter.requires_grad_(asked)
            parameter.grad = grad


@contextmanager
def _checkpointed(denoiser: nn.Module) -> Iterator[None]:
    """Inside, a call of the denoiser is computed again when gradients come back to it."""
    forward = denoiser.forward
    denoiser.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    try:
        yield
    finally:
        del denoiser.forward


@contextmanager
def _inputs_asked(target: Target, formats: Sequence[str], squares: dict[str, Tensor]) -> Iterator[None]:
    """Inside, a backward pass adds to ``squares`` what rounding each input to each format moves."""
    with ExitStack() as stack:
        for layer in target.layers if formats else ():
            roundings = [input_rounding(target, layer.name, written) for written in formats]
            axis = target.plan.map.layers[layer.name].channel_axis
            handle = target.module(layer.name).register_forward_pre_hook(_asking(roundings, axis, squares[layer.name]))
            stack.callback(handle.remove)
        yield


def _asking(roundings: Sequence[Callable[[Tensor], Tensor]], axis: int, into: Tensor) -> Callable[..., Any]:
    def before(module: nn.Module, args: Any) -> Any:
        if not args or not isinstance(args[0], Tensor):
            return None
        x = args[0].detach().requires_grad_() if not args[0].requires_grad else args[0].view_as(args[0])
        value = x.detach()

        def backward(grad: Tensor) -> None:
            for number, rounding in enumerate(roundings):
                moved = grad.float() * (rounding(value) - value).float()
                into[number] += float(moved.sum(axis).double().square().sum())

        x.register_hook(backward)
        return (x, *args[1:])

    return before
