"""What rounding does to histograms: criteria that give layers word lengths without a trial, as AdaPT (arXiv 2107.13490) does.

Everything comes from the weights, and from what each layer reads and gives in one recorded call of the float denoiser. No format is tried
in the denoiser. AdaPT takes the least word length that costs no divergence of the weights' histogram; ours divides a budget by the
divergence instead, so that it can be held against the integer program at equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reelquant.damage.noise import spread
from reelquant.damage.rounding import rounded_weight
from reelquant.damage.scene import Target
from reelquant.engine.recorded import again

BINS = 256
ROWS = 1024  # of a layer's input, at most: histograms of as many tokens do not change


@dataclass(frozen=True, eq=False)
class Seen:
    """A layer in one call.

    Attributes:
        module: it.
        x: what it read; the leading items of it, a convolution's whole.
        y: what it gave for these.
        weights: how many weights it has.
        energy: sum of squares of its output over the whole call.
    """

    module: nn.Module
    x: Tensor
    y: Tensor
    weights: int
    energy: float

    def again(self, weight: Tensor) -> Tensor:
        """What it would give with another weight."""
        kept = self.module.weight.data
        self.module.weight.data = weight
        try:
            with torch.no_grad():
                return self.module(self.x)
        finally:
            self.module.weight.data = kept


def divergence(values: Tensor, rounded: Tensor) -> float:
    """Of the histogram of rounded values from that of the values, in nats (Kullback and Leibler)."""
    low, high = float(values.min()), float(values.max())
    p, q = ((one.float().clamp(low, high).histc(BINS, low, high) + 1e-3).double() for one in (values, rounded))
    p, q = p / p.sum(), q / q.sum()
    return float((p * (p / q).log()).sum())


def relative_error(values: Tensor, rounded: Tensor) -> float:
    """Squared error over the mean square: twice the divergence of Gaussians around the values, with the variance of the values."""
    return float((rounded - values).float().square().mean() / values.float().square().mean().clamp(min=1e-20))


Criterion = Callable[[Seen, Tensor], float]


def _weights(seen: Seen, rounded: Tensor) -> float:
    return seen.weights * divergence(seen.module.weight.data, rounded)


def _outputs(measure: Callable[[Tensor, Tensor], float], weighed: Callable[[Seen], float], seen: Seen, rounded: Tensor) -> float:
    return weighed(seen) * measure(seen.y, seen.again(rounded))


CRITERIA: Mapping[str, Criterion] = {
    "divergence of weights x size": _weights,  # AdaPT's own
    "divergence of outputs x energy": partial(_outputs, divergence, lambda seen: seen.energy),
    "error of outputs": partial(_outputs, relative_error, lambda seen: 1.0),
}
"""Outputs are those of the layer for recorded inputs, so histograms of weights and inputs both take part. The error of outputs times size
or energy was tried, too, and divergences of outputs without a weight or times size: by the map of tiny-dit they divide worse."""


def observed(target: Target) -> dict[str, Seen]:
    """Every layer in the recorded call in the middle of the trajectory."""
    (number,) = spread(target.calls, 1)
    found: dict[str, Seen] = {}

    def watching(name: str, weights: int) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if name not in found:
                x, y = (args[0] if args else kwargs["input"]).detach(), output.detach()
                if isinstance(module, nn.Linear):
                    x, y = x.reshape(-1, x.shape[-1])[:ROWS], y.reshape(-1, y.shape[-1])[:ROWS]
                found[name] = Seen(module, x, y, weights, float(output.float().square().sum()))

        return after

    with ExitStack() as stack, torch.no_grad():
        for layer in target.layers:
            stack.callback(target.module(layer.name).register_forward_hook(watching(layer.name, layer.weights), with_kwargs=True).remove)
        again(target.denoiser, target.calls[number])
    return found


def damages(target: Target, formats: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Of every criterion, ``[layers, formats]``."""
    seen = observed(target)
    rounded = {(name, fmt): rounded_weight(target, name, fmt) for name in seen for fmt in formats}
    for words, criterion in CRITERIA.items():
        rows = [[criterion(seen[layer.name], rounded[layer.name, fmt]) for fmt in formats] for layer in target.layers]
        yield words, np.array(rows)
