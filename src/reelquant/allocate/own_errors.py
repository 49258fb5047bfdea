"""What formats do to the output of a layer by itself, from the inputs that it had in recorded calls: no format is tried in the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reelquant.nn import get_module
from reelquant.observe import RecordedCall
from reelquant.stages import ModelWork, Specs

ROWS = 256  # tokens of a linear layer's input that are kept of each call


@torch.no_grad()
def own_errors(work: ModelWork, options: Mapping[str, Sequence[Specs]], calls: Sequence[RecordedCall]) -> np.ndarray:
    """Squared error of every layer's output over its mean square, mean over calls, for each of its numbers: ``[layers, formats]``.

    Inputs are left in float, whatever their numbers are: only the weight is chosen here. Of a linear layer the first :data:`ROWS` tokens
    of a call count, of a convolution the first item. Layers that no recorded call runs have no error.

    Source: AdaPT (arXiv 2107.13490) chooses word lengths by the divergence of histograms of weights, without trials. The error here is
    twice the divergence between Gaussians around the float and the rounded output that have the mean square of the output. On tiny-dit
    histograms themselves divided bits worse than one format for all (benchmarks/results/sensitivity-rows-tiny-dit.md).
    """
    seen = _inputs(work, options, calls)
    return np.array([[_error(work, name, one, seen[name]) for one in row] for name, row in options.items()])


def _inputs(work: ModelWork, names: Mapping[str, Any], calls: Sequence[RecordedCall]) -> dict[str, list[Tensor]]:
    """What every layer read in each call."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def reading(name: str, number: int) -> Callable[..., None]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if len(found[name]) <= number:
                found[name].append(_part(module, args[0] if args else kwargs["input"]))

        return before

    for call in calls:
        with ExitStack() as stack:
            for name in names:
                hook = reading(name, len(found[name]))
                stack.callback(get_module(work.denoiser, name).register_forward_pre_hook(hook, with_kwargs=True).remove)
            work.output(call)
        work.advance()
    return found


def _part(module: nn.Module, x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])[:ROWS].clone() if isinstance(module, nn.Linear) else x[:1].clone()


def _error(work: ModelWork, name: str, specs: Specs, inputs: Sequence[Tensor]) -> float:
    exact = [get_module(work.denoiser, name)(x).float() for x in inputs]
    with work.drafted({name: specs._replace(input=None)}):
        rounded = [get_module(work.denoiser, name)(x).float() for x in inputs]
    errors = [(b - a).square().mean() / a.square().mean().clamp(min=1e-20) for a, b in zip(exact, rounded, strict=True)]
    return float(torch.stack(errors).double().mean()) if errors else 0.0
