"""All changes at once from one backward pass: how far each rounding error moves the output, to first order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from reelquant._progress import Progress
from reelquant.clock import ANY, BOTH
from reelquant.damage.kept import Kept
from reelquant.damage.rounding import input_rounding, rounded_weight, rows_of
from reelquant.damage.scene import HALVES, Target
from reelquant.damage.spread import Seen
from reelquant.engine.recorded import again
from reelquant.observe import RecordedCall


def by_gradient(progress: Progress, target: Target, weights: Sequence[str], inputs: Sequence[str], kept: Kept) -> Seen:
    """Damage of every format of every weight and input, to the output of every recorded call.

    An error ``d`` of a weight moves the output by ``J d``. For a random vector ``v`` of signs, ``E (v^T J d)^2 = |J d|^2``, and
    ``v^T J`` is one backward pass, for all layers and formats together. Rounding errors of different rows of a weight, and of different
    positions of an input, are taken to be independent: squares are summed row by row, which varies far less from one ``v`` to the next
    than the square of the sum. The result is over the variance of the output.

    Source: the Gauss-Newton matrix with Hutchinson's estimator, as HAWQ-V2 (arXiv 1911.03852) uses it for the trace of the Hessian.
    Deviations: the real rounding error of each format takes the place of the trace times its squared norm, the loss is the squared error
    of the denoiser's output (which needs no label), and inputs are treated alike. LRP-QViT (arXiv 2401.11243) asks gradients, too, for the
    share of a layer in the output; here they are asked for the error.
    """
    jobs = [(number, half) for number, call in enumerate(target.calls) for half in _halves(target, call)]
    progress.phase(f"{target.component}: gradients", len(jobs))
    deltas = _Deltas(target, weights)
    seen = Seen("gradient", target, tuple(weights), tuple(inputs))
    for number, half in jobs:
        call = target.calls[number]

        def measured(number: int = number, call: RecordedCall = call, half: int = half) -> list[float]:
            return _moved(target, call, half, deltas, inputs, seed=number)

        values = kept.of(f"gradient, {target.component}, call {number}, half {half}, {seen.formats}", measured)
        seen.add(call.step, half if half != ANY else call.half, values)
        progress.advance()
    return seen


def _halves(target: Target, call: RecordedCall) -> list[int]:
    """One backward pass for a call, or one for each half that it computes."""
    return list(HALVES.values()) if call.half == BOTH else [ANY]


class _Deltas:
    """Rounding errors of weights, computed when they are first asked for."""

    def __init__(self, target: Target, formats: Sequence[str]) -> None:
        self.target, self.formats = target, formats
        self._known: dict[str, list[Tensor]] = {}

    def of(self, layer: str) -> list[Tensor]:
        if layer not in self._known:
            weight = self.target.module(layer).weight.detach()
            self._known[layer] = [rounded_weight(self.target, layer, written) - weight for written in self.formats]
        return self._known[layer]


def _moved(target: Target, call: RecordedCall, half: int, deltas: _Deltas, inputs: Sequence[str], seed: int) -> list[float]:
    """Of every layer, the damage of every weight format and then of every input format, one layer after the other."""
    names = [layer.name for layer in target.layers]
    squares = {name: torch.zeros(len(inputs), dtype=torch.float64) for name in names}
    with _weights_asked(target) as weights, _inputs_asked(target, inputs, squares), torch.enable_grad():
        outputs = [leaf for leaf in tree_leaves(again(target.denoiser, call)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        # all leaves take part: asked for weights alone, torch would not go on to inputs that no weight comes before
        torch.autograd.backward(outputs, _signs(outputs, half, seed))
        grads = {name: weight.grad for name, weight in weights.items()}
    parts = [output.detach()[rows_of(half, len(output))].float() for output in outputs]
    scale = 1 / max(sum(float(part.var(correction=0)) * part.numel() for part in parts), 1e-30)
    found = []
    for name in names:
        grad = grads[name]
        errors = [0.0] * len(deltas.formats) if grad is None else [_by_rows(grad, delta) for delta in deltas.of(name)]
        found += [one * scale for one in (*errors, *squares[name].tolist())]
    return found


def _signs(outputs: Sequence[Tensor], half: int, seed: int) -> list[Tensor]:
    """Random signs in the rows of a half, zeros elsewhere."""
    generator, found = torch.Generator().manual_seed(seed), []
    for output in outputs:
        signs = torch.zeros(output.shape)
        rows = rows_of(half, len(output))
        signs[rows] = torch.randint(0, 2, signs[rows].shape, generator=generator).float() * 2 - 1
        found.append(signs.to(output.device, output.dtype))
    return found


def _by_rows(grad: Tensor, delta: Tensor) -> float:
    """Sum over rows of the square of what each row's error moves."""
    return float((grad.float() * delta.float()).flatten(1).sum(1).double().square().sum())


@contextmanager
def _weights_asked(target: Target) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, a backward pass fills the gradients of the layers' weights, and of no other parameter: the weights by layer."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in target.denoiser.parameters()]
    target.denoiser.requires_grad_(False)
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

        def backward(grad: Tensor) -> None:
            value = x.detach()
            for number, rounding in enumerate(roundings):
                moved = grad.float() * (rounding(value) - value).float()
                into[number] += float(moved.sum(axis).double().square().sum())

        x.register_hook(backward)
        return (x, *args[1:])

    return before
