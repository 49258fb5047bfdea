"""What the report says about one layer: sizes, errors and figures of its input, on the rows that calibration sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.engine.choice import Choice
from reelquant.engine.plan import LayerPlan
from reelquant.formats import Quantizer, QuantSpec, dynamic
from reelquant.formats.criteria import coverage, nmse, retrieval_accuracy, tdscore
from reelquant.observe import InputStatistics
from reelquant.stages import LayerWork

Rounding = Callable[[Tensor], Tensor]
BUILDING = ("rewrite", "split", "solve_layer")
"""Hooks of stages whose parameters belong to the record of a layer."""


@dataclass(frozen=True)
class LayerRecord:
    """What the report says about one quantized layer.

    Attributes:
        error: mean squared output error over the output's variance, on sampled inputs; None for data-free recipes.
        coverage: distinct input codes a channel uses over all codes, mean over channels.
        tdscore, retrieval, skewness: of the input features of temporal layers.
        solver: what chose the codes; ``replaced`` names a solver that lost to it.
    """

    name: str
    role: str
    weight: str
    input: str
    bytes_before: int
    bytes_after: int
    error: float | None = None
    coverage: float | None = None
    tdscore: float | None = None
    retrieval: float | None = None
    skewness: float | None = None
    folded: bool = False
    solver: str = "nearest"
    replaced: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def record_of(row: LayerPlan, work: LayerWork, choice: Choice, layer: nn.Module, *, folded: bool) -> LayerRecord:
    """The record of a layer that was just built."""
    assert work.solution is not None
    chosen = choice.named([entry for entry in row.entries if any(entry.acts(hook) for hook in BUILDING)])
    return LayerRecord(
        row.layer.name,
        row.layer.role,
        str(work.site.specs.weight),
        _input_name(work),
        row.bytes_before,
        layer_bytes(layer),
        folded=folded,
        solver=work.solution.solver,
        replaced=work.solution.replaced,
        options=chosen,
        **_figures(work),
    )


def _input_name(work: LayerWork) -> str:
    spec = work.site.specs.input
    if spec is None:
        return "float"
    return str(QuantSpec(work.inputs[0].format, spec.granularity) if work.inputs else spec)


def layer_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's own parameters and buffers."""
    return _bytes([*layer.parameters(recurse=False), *layer.buffers(recurse=False)])


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model."""
    return _bytes([*model.parameters(), *model.buffers()])


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _figures(work: LayerWork) -> dict[str, float]:
    """Error, coverage and, for temporal layers, discriminability. What rows cannot tell (scales per frame) is left out."""
    seen = work.statistics
    if seen is None or seen.rows is None:
        return {}
    rows = seen.rows.rows.to(work.weight.device)
    rounding = _rounding(work, seen)
    figures = {} if rounding is None else {"error": _output_error(work, rows, rounding)}
    if work.inputs and rounding is not None:
        figures["coverage"] = _coverage(work, seen, rows)
    return figures | _temporal(work, seen, rounding)


def _output_error(work: LayerWork, rows: Tensor, rounding: Rounding) -> float:
    assert work.solution is not None
    matrix = work.weight.flatten(1)
    bias, stored_bias = (0 if one is None else one for one in (work.bias, work.stored_bias))
    reference = rows @ matrix.T + bias
    rounded = rounding(work.rewrite.per_tap(work.taps).input(rows))
    output = rounded @ work.solution.values.T + stored_bias
    branch = work.branch_weight()
    if isinstance(branch, Tensor):
        output = output + work.outside.per_tap(work.taps).input(rows) @ branch.flatten(1).T
    return float(nmse(reference, output))


def _coverage(work: LayerWork, seen: InputStatistics, rows: Tensor) -> float:
    assert work.inputs and seen.rows is not None
    rewritten = work.rewrite.per_tap(work.taps).input(rows)
    codes = _by_slot(work.inputs, seen.rows.steps, rewritten, Quantizer.codes)
    channels = codes.reshape(len(codes), -1, work.taps).movedim(1, 2).reshape(-1, seen.geometry.channels)
    return float(coverage(channels, work.inputs[0].format.bits))


def _temporal(work: LayerWork, seen: InputStatistics, rounding: Rounding | None) -> dict[str, float]:
    features = seen.features
    if features is None or features.varies or len(features.features) < 2:
        return {}
    values = rounded = features.features
    if work.inputs:
        rounded = _by_slot(work.inputs, torch.tensor(seen.range.seen), values, Quantizer.__call__)
    elif rounding is not None:
        rounded = rounding(values)
    deviation = values - values.mean()
    return {
        "tdscore": float(tdscore(values, rounded)),
        "retrieval": float(retrieval_accuracy(values, rounded)),
        "skewness": float(deviation.pow(3).mean() / deviation.square().mean().clamp(min=1e-20).pow(1.5)),
    }


def _rounding(work: LayerWork, seen: InputStatistics) -> Rounding | None:
    """What the layer does to sampled rows of its rewritten input; None if rows do not tell."""
    spec, inputs = work.site.specs.input, work.inputs
    if spec is None:
        return lambda rows: rows
    if spec.dynamic:
        if spec.granularity.kind == "sample":  # rows of many samples: the scale they share is no finer than that of a sample
            spec = replace(spec, granularity=replace(spec.granularity, kind="tensor"))
        told = ("tensor", "token") if work.taps > 1 else ("tensor", "token", "group")
        return (lambda rows: dynamic(spec, rows)(rows)) if spec.granularity.kind in told else None
    whole = spec.granularity.kind == "tensor" or (spec.granularity.kind == "channel" and work.taps == 1)
    if not inputs or not whole or seen.rows is None:
        return None
    steps = seen.rows.steps
    return lambda rows: _by_slot(inputs, steps, rows, Quantizer.__call__)


def _by_slot(inputs: Sequence[Quantizer], steps: Tensor, rows: Tensor, apply: Callable[[Quantizer, Tensor], Tensor]) -> Tensor:
    """Apply to every row the quantizer of its step."""
    if len(inputs) == 1:
        return apply(inputs[0], rows)
    parts = [apply(quantizer, rows[steps.to(rows.device) == slot]) for slot, quantizer in enumerate(inputs)]
    order = torch.cat([(steps == slot).nonzero()[:, 0] for slot in range(len(inputs))])
    return torch.cat(parts)[order.argsort().to(rows.device)]
