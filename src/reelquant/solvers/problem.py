"""What a solver is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reelquant.formats import QuantSpec
from reelquant.stages import LayerWork


@dataclass(frozen=True, eq=False)
class Problem:
    """Find codes for one weight.

    Attributes:
        weight: ``[out, in]`` float32, transforms already in; convolutions flattened.
        spec: the format, granularity and range wanted.
        covariance: ``[in, in]`` of the (transformed) input, centred, or None for data-free solvers.
        factor: gives :func:`reelquant.observe.inverse_factor` of the covariance for a damping and an order of its columns, from a
            cache; None: it is computed.
    """

    weight: Tensor
    spec: QuantSpec
    covariance: Tensor | None = None
    factor: Callable[[float, Tensor], Tensor] | None = None

    def objective(self, quantized: Tensor) -> float:
        """Mean squared output error that no bias can repair: ``tr(E C E^T) / out``; plain squared error without data."""
        error = quantized - self.weight
        if self.covariance is None:
            return float(error.square().sum(1).mean())
        return float(((error @ self.covariance) * error).sum() / len(error))


def problem_of(layer: LayerWork) -> Problem:
    """The problem of a layer's weight, with second moments of the rewritten input if they were observed."""
    gram = None if layer.statistics is None else layer.statistics.gram
    if gram is None:
        return Problem(layer.matrix, layer.site.specs.weight)
    rewrite = layer.rewrite
    gram = gram.mixed(rewrite.mixes) if rewrite.mixes else gram
    if rewrite.scale is None:
        return Problem(layer.matrix, layer.site.specs.weight, gram.covariance, gram.inverse_factor)
    scale = rewrite.scale.repeat_interleave(layer.taps)

    def factor(damping: float, order: Tensor) -> Tensor:
        return gram.inverse_factor(damping, order) * scale[order]

    return Problem(layer.matrix, layer.site.specs.weight, gram.covariance / torch.outer(scale, scale), factor)
