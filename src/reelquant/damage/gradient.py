"""All changes at once from one backward pass through a whole trajectory: how far each rounding error moves the final latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reelquant._errors import UnsupportedError
from reelquant.allocate.table import EVERY, Damage, Part
from reelquant.clock import BOTH
from reelquant.damage.kept import Kept
from reelquant.damage.rounding import Steps, input_rounding, on_input, rounded_weight
from reelquant.damage.scene import HALVES, Scene, Target, following
from reelquant.evidence import bootstrap

PROBES = 3  # backward passes for every clip

Cut = tuple[Steps, str | None]  # steps and half of guidance that count; None for all


def by_gradient(
    scene: Scene, target: Target, weights: Sequence[str], inputs: Sequence[str], ranges: Sequence[tuple[int, int]], kept: Kept
) -> tuple[list[Damage], np.ndarray | None]:
    """Damage of every format of every weight and input to the final latents, to first order.

    An error ``d`` of a weight, the same at all steps, moves the final latents by ``J d``. For a random vector ``v`` of signs,
    ``E (v^T J d)^2 = |J d|^2``, and ``v^T J`` is one backward pass through the sampler, for all layers and formats together. Each call of
    the denoiser is computed again on the way back, so that the activations of one call are held at a time (those of all inputs if
    formats of inputs are asked for). Rounding errors of different rows of a weight, and those of different channels and calls of inputs,
    are taken to be independent: squares are summed row by row or channel by channel, which varies far less from one ``v`` to the next
    than the square of the sum. Errors of one channel at different positions are not: on a plain surface of a clip they are alike. The
    result is over the variance of the latents.

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
    steps = len(target.timesteps)
    cuts += [((step, step), None) for step in range(steps)]
    values, pairs = [], len(weights) * steps * steps
    words = f"weights {', '.join(weights)}, inputs {', '.join(inputs)}, {len(ranges)} ranges, by channel"
    for clip in range(len(scene.prompts)):
        for probe in range(PROBES):

            def measured(clip: int = clip, probe: int = probe) -> list[float]:
                one = _Pass(scene, target, deltas, tuple(inputs))
                return [*one.run(clip, probe, cuts).flatten().tolist(), *one.products(steps).flatten().tolist()]

            values.append(kept.of(f"gradient, {target.component}, clip {clip}, probe {probe}, {words}, products of steps", measured))
            scene.progress.advance()
    damages, products = np.split(np.array(values), [-pairs] if pairs else [len(values[0])], axis=1)
    found = damages.reshape(len(values), len(cuts), len(target.layers), -1)
    columns: list[tuple[Part, str]] = [*(("weight", one) for one in weights), *(("input", one) for one in inputs)]  # type: ignore[list-item]
    cosines = _cosines(products.reshape(len(values), len(weights), steps, steps)) if pairs else None
    return _rows(target, columns, cuts, found, singles=steps), cosines


def _cosines(products: np.ndarray) -> np.ndarray:
    """``[steps, steps]`` from products ``[passes, formats, steps, steps]``: mean over formats."""
    grams = products.sum(0)
    sizes = np.sqrt(np.maximum(np.diagonal(grams, axis1=1, axis2=2), 1e-300))
    return (grams / (sizes[:, :, None] * sizes[:, None])).mean(0).clip(-1, 1)


def _rows(target: Target, columns: Sequence[tuple[Part, str]], cuts: Sequence[Cut], found: np.ndarray, singles: int) -> list[Damage]:
    """Rows of all layers, and of all weights or inputs together at single steps, which are the last cuts."""
    rows = []
    for number, (steps, half) in enumerate(cuts[: len(cuts) - singles]):
        for place, layer in enumerate(target.layers):
            for column, (part, written) in enumerate(columns):
                mean = bootstrap(found[:, number, place, column].tolist(), resamples=200)
                values = (mean.mean, mean.low, mean.high)
                rows.append(Damage(target.component, layer.name, part, written, "gradient", *values, steps, half))
    for number, (steps, _) in enumerate(cuts[len(cuts) - singles :], len(cuts) - singles):
        for column, (part, written) in enumerate(columns):
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


Place = tuple[int, int]  # step and half of a call


@dataclass(eq=False)
class _Pass:
    """One trajectory forward and back.

    Attributes:
        rows: by place and layer, what the error of each row of the weight moves, ``[formats, rows]``.
        squares: by place and layer, the squares of what errors of the input move, ``[formats]``.
        scale: one over the squared error that has the damage 1.
    """

    scene: Scene
    target: Target
    deltas: _Deltas
    inputs: tuple[str, ...]
    rows: dict[tuple[Place, str], Tensor] = field(default_factory=dict)
    squares: dict[tuple[Place, str], Tensor] = field(default_factory=dict)
    scale: float = 1.0

    def run(self, clip: int, probe: int, cuts: Sequence[Cut]) -> np.ndarray:
        """Damages ``[cuts, layers, formats of weights and then of inputs]``."""
        with ExitStack() as stack:
            stack.enter_context(_weights_asked(self.scene.pipe, self.target))
            stack.enter_context(following(self.scene.targets))
            stack.enter_context(_checkpointed(self.target.denoiser))
            for layer in self.target.layers:
                self._listen(stack, layer.name)
            latents = self.scene.with_gradients(clip)
            if not latents.requires_grad:
                raise UnsupportedError(
                    f"no gradient comes back through the sampler of {type(self.scene.pipe).__name__} to '{self.target.component}'; "
                    "measure by trajectory or noise"
                )
            generator = torch.Generator().manual_seed(1000 * clip + probe)
            signs = torch.randint(0, 2, latents.shape, generator=generator).to(latents.device, latents.dtype) * 2 - 1
            latents.backward(signs)
        self.scale = 1 / max(float(latents.detach().float().var(correction=0)) * latents.numel(), 1e-30)
        return np.stack([self._cut(cut) for cut in cuts]) * self.scale

    def products(self, steps: int) -> np.ndarray:
        """``[formats, steps, steps]``, after :meth:`run`: products of what rounding all weights at two steps moves, over the variance."""
        found = np.zeros((len(self.deltas.formats), steps, steps))
        for layer in self.target.layers:
            moved = torch.zeros(steps, *next((one.shape for (_, name), one in self.rows.items() if name == layer.name), (0, 0)))
            for ((step, _), name), value in self.rows.items():
                if name == layer.name:
                    moved[step] += value.cpu()
            if moved.numel():
                found += torch.einsum("sfr,tfr->fst", moved.double(), moved.double()).numpy()
        return found * self.scale

    def _listen(self, stack: ExitStack, name: str) -> None:
        """Hear the gradients of a layer's weight and input in every call by itself.

        A parameter gets its gradient once, when all calls have given their share; so each call multiplies with a view of its own, which
        stands before the parameter in the module while the layer runs.
        """
        module = self.target.module(name)
        weight, axis = module.weight, self.target.plan.map.layers[name].channel_axis
        roundings = [input_rounding(self.target, name, written) for written in self.inputs]

        def before(*_: Any) -> None:
            place = (self.target.step, self.target.half)
            view = weight.view_as(weight)
            view.register_hook(lambda grad: _add(self.rows, (place, name), self._moved(name, grad)))
            module.__dict__["weight"] = view

        def read(given: Tensor) -> Tensor:
            place = (self.target.step, self.target.half)
            x = given.view_as(given) if given.requires_grad else given.detach().requires_grad_()
            value = x.detach()
            x.register_hook(lambda grad: _add(self.squares, (place, name), _squares(grad, value, roundings, axis)))
            return x

        def after(*_: Any) -> None:
            module.__dict__.pop("weight", None)

        stack.callback(after)  # a call that is computed again ends as soon as it has what it needs, and then no hook runs
        stack.callback(module.register_forward_pre_hook(before).remove)
        if roundings:
            stack.callback(on_input(module, read).remove)
        stack.callback(module.register_forward_hook(after).remove)

    def _moved(self, name: str, grad: Tensor) -> Tensor:
        return torch.stack([(grad.flatten(1).float() * delta.float()).sum(1) for delta in self.deltas.of(name)])

    def _cut(self, cut: Cut) -> np.ndarray:
        steps, half = cut
        wanted = None if half is None else HALVES[half]
        found = np.zeros((len(self.target.layers), len(self.deltas.formats) + len(self.inputs)))
        for number, layer in enumerate(self.target.layers):
            for start, kept, of in ((0, self.rows, _summed_rows), (len(self.deltas.formats), self.squares, _summed)):
                mine = [
                    value
                    for ((step, its), name), value in kept.items()
                    if name == layer.name and (steps is None or steps[0] <= step <= steps[1]) and wanted in (None, its)
                ]
                if mine:
                    values = of(mine)
                    found[number, start : start + len(values)] = values
        return found


def _add(kept: dict[tuple[Place, str], Tensor], key: tuple[Place, str], value: Tensor) -> None:
    kept[key] = kept[key] + value if key in kept else value


def _squares(grad: Tensor, value: Tensor, roundings: Sequence[Callable[[Tensor], Tensor]], axis: int) -> Tensor:
    """Sum over channels of the square of what the errors of a channel move, for every format."""
    moved = [(grad.float() * (rounding(value) - value).float()).movedim(axis, -1).flatten(0, -2).sum(0) for rounding in roundings]
    return torch.stack([one.double().square().sum() for one in moved])


def _summed_rows(values: Sequence[Tensor]) -> np.ndarray:
    """Errors of a weight are the same in all calls: what they move is added up before it is squared."""
    return torch.stack(list(values)).double().sum(0).square().sum(1).cpu().numpy()


def _summed(values: Sequence[Tensor]) -> np.ndarray:
    return torch.stack(list(values)).sum(0).cpu().numpy()


@contextmanager
def _weights_asked(pipe: Any, target: Target) -> Iterator[None]:
    """Inside, gradients go to the layers' weights, and to no other parameter."""
    modules = [one for one in pipe.components.values() if isinstance(one, nn.Module)]
    every = {id(parameter): parameter for module in [*modules, target.denoiser] for parameter in module.parameters()}.values()
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in every]
    for parameter in every:
        parameter.requires_grad_(False)
    for weight in (target.module(layer.name).weight for layer in target.layers):
        weight.grad = None
        weight.requires_grad_(True)
    try:
        yield
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
