"""Quantized layers inside compiled graphs: one opaque operator, so that a graph is the same whatever kernel computes a layer.

The graph carries the step as two tensors, and the operator reads them when it runs; so one compilation serves all steps, tables of
outputs included. Layers are found by a number, because operators take tensors and numbers only.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reelquant.clock import ANY, Clock, Moment

if TYPE_CHECKING:
    from reelquant.nn.layers import QuantLayer

_layers: weakref.WeakValueDictionary[int, QuantLayer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def number_of(layer: QuantLayer) -> int:
    """A number by which :func:`call` finds the layer, as long as it lives."""
    new = next(_numbers)
    _layers[new] = layer
    return new


def call(layer: QuantLayer, x: Tensor, clock: Sequence[Clock], activation: str) -> Tensor:
    """The layer as one node of a graph."""
    return torch.ops.reelquant.layer(x, clock[0].state if clock else [], layer.number, activation)


@torch.library.custom_op("reelquant::layer", mutates_args=())
def _run(x: Tensor, step: Sequence[Tensor], number: int, activation: str) -> Tensor:
    layer = _layers[number]
    return _as_declared(layer, layer.compute(x, _moment(layer, x, step), activation))


@_run.register_fake
def _shape(x: Tensor, step: Sequence[Tensor], number: int, activation: str) -> Tensor:
    layer = _layers[number]
    return _as_declared(layer, x.new_empty(layer.output_shape(x)))


def _moment(layer: QuantLayer, x: Tensor, step: Sequence[Tensor]) -> Moment:
    """The state of the clock; where kernels read the slot from the device, nothing waits for it that this layer does not need."""
    if not step:
        return Moment()
    layout, (slot, stored, protected, half) = layer.layout, step
    exact = bool(stored) if layout.table else False
    protects = bool(protected) if layout.input is not None and layer.clock[0].protected_slots else False
    return Moment(slot if x.is_cuda and not exact else int(slot), exact, protects, int(half) if layout.halves else ANY)


def _as_declared(layer: QuantLayer, out: Tensor) -> Tensor:
    """In the memory format that graphs are told; one clip without a batch axis has no other than the contiguous one."""
    batched = layer.output_format == torch.contiguous_format or out.ndim == len(layer.weight_shape)
    return out.contiguous(memory_format=layer.output_format) if batched else out.contiguous()
