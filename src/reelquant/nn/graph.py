"""Quantized layers inside compiled graphs: opaque operators, so that a graph is the same whatever kernel computes a layer.

The graph carries the step as two tensors, and the operator reads them when it runs; so one compilation serves all steps, tables of
outputs included. Modules are found by a number, because operators take tensors and numbers only.

Codes of an input are not shared between operators: compiled code writes into memory it no longer needs, through the very tensor object that
an operator has read before, and no version of that tensor counts it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reelquant.clock import ANY, Clock, Moment
from reelquant.kernels.recall import forget

if TYPE_CHECKING:
    from reelquant.nn.layers import QuantLayer
    from reelquant.nn.tokenwise import Tokenwise

_modules: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def number_of(module: Any) -> int:
    """A number by which graphs find a module, or what stands beside one, as long as it lives."""
    new = next(_numbers)
    _modules[new] = module
    return new


def module_of(number: int) -> Any:
    """What :func:`number_of` gave the number to."""
    return _modules[number]


_outlining: ContextVar[Tensor | None] = ContextVar("reelquant_outlining", default=None)


@contextmanager
def outlining(slot: Tensor) -> Iterator[None]:
    """Layers called inside say their shape and compute nothing: the denoiser is being traced for a graph of another runtime.

    Nothing else of this library acts meanwhile; ``slot``, the step, is an input of that graph.
    """
    token = _outlining.set(slot)
    try:
        yield
    finally:
        _outlining.reset(token)


def outlined() -> bool:
    """Whether a denoiser is being traced in this thread."""
    return not torch.compiler.is_compiling() and _outlining.get() is not None  # dynamo does not know context variables


def outline(layer: QuantLayer, x: Tensor) -> Tensor:
    """The layer as one node of a trace."""
    slot = _outlining.get()
    assert slot is not None
    return torch.ops.reelquant.outlined(x, slot, layer.number)


def call(layer: QuantLayer, x: Tensor, clock: Sequence[Clock], activation: str) -> Tensor:
    """The layer as one node of a graph."""
    return torch.ops.reelquant.layer(x, _state(clock), layer.number, activation)


def call_tokenwise(module: Tokenwise, x: Tensor, clock: Sequence[Clock]) -> Tensor:
    """A module of several layers as one node; all of them have the same clock."""
    return torch.ops.reelquant.tokenwise(x, _state(clock), module.reelquant_number)


def _state(clock: Sequence[Clock]) -> list[Tensor]:
    return clock[0].state if clock else []


@torch.library.custom_op("reelquant::layer", mutates_args=())
def _run(x: Tensor, step: Sequence[Tensor], number: int, activation: str) -> Tensor:
    forget()
    layer: QuantLayer = _modules[number]
    return _as_declared(layer, layer.compute(x, _moment(layer, x, step), activation))


@_run.register_fake
def _shape(x: Tensor, step: Sequence[Tensor], number: int, activation: str) -> Tensor:
    layer: QuantLayer = _modules[number]
    return _as_declared(layer, x.new_empty(layer.output_shape(x)))


@torch.library.custom_op("reelquant::outlined", mutates_args=())
def _outlined(x: Tensor, slot: Tensor, number: int) -> Tensor:
    return x.new_zeros(_modules[number].output_shape(x))


@torch.library.custom_op("reelquant::tokenwise", mutates_args=())
def _run_tokenwise(x: Tensor, step: Sequence[Tensor], number: int) -> Tensor:
    forget()
    module: Tokenwise = _modules[number]
    if step:
        module.reelquant_layers()[0].clock[0].follow(step)
    return module.forward(x)  # its hooks are in the graph


@_run_tokenwise.register_fake
def _shape_tokenwise(x: Tensor, step: Sequence[Tensor], number: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], _modules[number].reelquant_width)


def _moment(layer: QuantLayer, x: Tensor, step: Sequence[Tensor]) -> Moment:
    """The state of the clock; where kernels read the slot from the device, nothing waits for it that this layer does not need."""
    if not step:
        return Moment()
    layout, (slot, stored, protected, half) = layer.layout, step
    exact = bool(stored) if layout.table else False
    protects = bool(protected) if layout.input is not None and layer.clock[0].protected_slots else False
    return Moment(slot if x.is_cuda and not exact else int(slot), exact, protects, int(half) if layout.cfg_halves else ANY)


def _as_declared(layer: QuantLayer, out: Tensor) -> Tensor:
    """In the memory format that graphs are told; one clip without a batch axis has no other than the contiguous one."""
    batched = layer.output_format == torch.contiguous_format or out.ndim == len(layer.weight_shape)
    return out.contiguous(memory_format=layer.output_format) if batched else out.contiguous()
