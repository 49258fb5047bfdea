"""The cheapest way: how much noise rounding makes at the output of a layer, times how far noise there reaches the denoiser's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._progress import Progress
from reelquant.allocate.measured import flat
from reelquant.damage.kept import Kept
from reelquant.damage.rounding import disturbed, input_of, input_rounding, rounded_weight
from reelquant.damage.scene import Target
from reelquant.damage.spread import Seen
from reelquant.engine.recorded import again
from reelquant.formats.criteria import nmse
from reelquant.observe import RecordedCall

POWER = 1e-3  # of the noise at a layer's output over the mean square of that output


def by_noise(progress: Progress, target: Target, weights: Sequence[str], inputs: Sequence[str], calls: int, kept: Kept) -> Seen:
    """Damage of every format of every weight and input, to the output of some recorded calls.

    Two figures are multiplied. One is the noise of rounding at the output of the layer over the mean square of that output, from the error
    of every weight and the mean square of each input channel (or from the weights and the error of each channel), as if errors were
    independent. The other is the error of the denoiser's output over its variance, per noise over mean square at the layer's output: white
    noise is added there, once for each layer and call, whatever the number of formats.

    Source: QuantNAS (arXiv 2208.14839) puts noise in the place of rounding. Deviations: it does so to train; here noise is injected once
    to learn how a layer's error grows.

    Args:
        calls: how many recorded calls are used, at steps as different as possible.
    """
    chosen = spread(target.calls, calls)
    progress.phase(f"{target.component}: noise", len(chosen) * (len(target.layers) + 1))
    deltas = _squares(target, weights)
    seen = Seen("noise", target, tuple(weights), tuple(inputs))
    for number in chosen:
        call = target.calls[number]

        def powers(call: RecordedCall = call) -> list[float]:
            return _powers(target, call, deltas, weights, inputs)

        power = torch.tensor(kept.of(f"noise, {target.component}, power, call {number}, {seen.formats}", powers)).reshape(
            len(target.layers), -1
        )
        progress.advance()
        reach = []
        for place, layer in enumerate(target.layers):

            def reached(call: RecordedCall = call, name: str = layer.name, seed: int = place) -> list[float]:
                return [_reach(target, call, name, seed)]

            reach += kept.of(f"noise, {target.component}, reach, call {number}, {layer.name}", reached)
            progress.advance()
        seen.add(call.step, call.half, (power * torch.tensor(reach)[:, None]).flatten().tolist())
    return seen


def spread(calls: Sequence[RecordedCall], wanted: int) -> list[int]:
    """Numbers of so many calls, at steps and halves as different as possible."""
    ordered = sorted(range(len(calls)), key=lambda number: (calls[number].step, calls[number].half))
    count = min(wanted, len(ordered))
    return sorted({ordered[int((pick + 0.5) * len(ordered) / count)] for pick in range(count)})


@torch.no_grad()
def _reach(target: Target, call: RecordedCall, name: str, seed: int) -> float:
    """Error of the denoiser's output over its variance, per noise over mean square at a layer's output."""
    generator = torch.Generator().manual_seed(seed)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return None
        variance = output.float().var(correction=0).clamp(min=1e-20)
        return disturbed(output, float(POWER * output.float().square().mean() / variance), generator)

    handle = target.module(name).register_forward_hook(after)
    try:
        found = again(target.denoiser, call)
    finally:
        handle.remove()
    return float(nmse(flat(call.output), flat(found))) / POWER


def _squares(target: Target, formats: Sequence[str]) -> Callable[[str], list[Tensor]]:
    """Squared rounding errors of a weight, summed over outputs and taps: ``[channels]`` for every format."""
    known: dict[str, list[Tensor]] = {}

    def of(layer: str) -> list[Tensor]:
        if layer not in known:
            weight = target.module(layer).weight.detach()
            known[layer] = [_per_channel((rounded_weight(target, layer, written) - weight).float()) for written in formats]
        return known[layer]

    return of


def _per_channel(weight: Tensor) -> Tensor:
    """Sum of squares for every input channel of a weight ``[out, channels, *kernel]``."""
    return weight.square().flatten(2).sum((0, 2)) if weight.ndim > 2 else weight.square().sum(0)


@torch.no_grad()
def _powers(
    target: Target, call: RecordedCall, deltas: Callable[[str], list[Tensor]], weights: Sequence[str], inputs: Sequence[str]
) -> list[float]:
    """Noise at every layer's output over the mean square of that output, for every weight format and then every input format."""
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        for layer in target.layers:
            roundings = [input_rounding(target, layer.name, written) for written in inputs]
            hook = _watching(target, layer.name, deltas(layer.name), roundings, found)
            stack.callback(target.module(layer.name).register_forward_hook(hook, with_kwargs=True).remove)
        again(target.denoiser, call)
    return [one for layer in target.layers for one in found.get(layer.name, [0.0] * (len(weights) + len(inputs)))]


def _watching(
    target: Target, name: str, deltas: Sequence[Tensor], roundings: Sequence[Callable[[Tensor], Tensor]], found: dict[str, list[float]]
) -> Callable[..., None]:
    """Looks at the first call of a layer."""
    axis = target.plan.map.layers[name].channel_axis

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if name in found or not isinstance(output, Tensor):
            return
        x, weight = input_of(args, kwargs).float(), module.weight.detach().float()
        bias = module.bias.detach().float() if module.bias is not None else None
        outputs = len(weight)
        product = output.float() if bias is None else output.float() - (bias if axis == -1 else bias.reshape(-1, *[1] * (x.ndim - 2)))
        size = product.square().mean().clamp(min=1e-20) * outputs
        means = _channel_means(x.square(), axis)
        errors = [float((delta.to(x.device) * means).sum() / size) for delta in deltas]
        own = _per_channel(weight)
        errors += [float((own * _channel_means((rounding(x) - x).square(), axis)).sum() / size) for rounding in roundings]
        found[name] = errors

    return after


def _channel_means(x: Tensor, axis: int) -> Tensor:
    """Mean over everything but the channels: ``[channels]``."""
    return x.movedim(axis, -1).flatten(0, -2).mean(0)
