"""Quantized layers inside compiled graphs: opaque operators, so that a graph is the same for every kernel of a layer.

The graph carries the state of the clock as tensors, and the operator reads them when it runs. So one compilation serves all steps, tables
of outputs included. An operator takes tensors and numbers only, so it finds its module by an integer handle.

Input codes are not shared between operators: compiled code may write new values into a tensor object that an operator has read before, and
that does not change the tensor's version counter.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from reelquant.clock import ANY, Clock, Moment
from reelquant.kernels.input_code_cache import forget
from reelquant.nn.layer_view import LayerView

_modules: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_handles = itertools.count()


def handle_of(module: Any) -> int:
    """A new handle for a module, or for an object that belongs to one; valid as long as the object lives."""
    new = next(_handles)
    _modules[new] = module
    return new


def by_handle(handle: int) -> Any:
    """The object that :func:`handle_of` gave this handle to."""
    return _modules[handle]


def is_alive(handle: int) -> bool:
    """Whether that object still exists."""
    return handle in _modules


def alive() -> list[Any]:
    """All objects with a handle."""
    return list(_modules.values())


_tracing: ContextVar[Tensor | None] = ContextVar("reelquant_tracing", default=None)


@contextmanager
def opaque_tracing(slot: Tensor) -> Iterator[None]:
    """Inside, layers are opaque operators that return zeros of the right shape: the denoiser is traced for a graph of another runtime.

    Nothing else of this library acts meanwhile. ``slot``, the step, is an input of that graph.
    """
    token = _tracing.set(slot)
    try:
        yield
    finally:
        _tracing.reset(token)


def is_tracing() -> bool:
    """Whether a denoiser is being traced in this thread."""
    return not torch.compiler.is_compiling() and _tracing.get() is not None  # dynamo does not know context variables


def trace_opaque(handle: int, x: Tensor) -> Tensor:
    """A layer as one node of a trace."""
    slot = _tracing.get()
    assert slot is not None
    return torch.ops.reelquant.opaque(x, slot, handle)


def call(handle: int, x: Tensor, clock: Sequence[Clock], activation: str) -> Tensor:
    """A layer as one node of a graph."""
    return torch.ops.reelquant.layer(x, _state(clock), handle, activation)


def call_tokenwise(handle: int, x: Tensor, clock: Sequence[Clock]) -> Tensor:
    """A module of several layers as one node; all of them have the same clock."""
    return torch.ops.reelquant.tokenwise(x, _state(clock), handle)


def _state(clock: Sequence[Clock]) -> list[Tensor]:
    return clock[0].state if clock else []


@torch.library.custom_op("reelquant::layer", mutates_args=())
def _run(x: Tensor, step: Sequence[Tensor], handle: int, activation: str) -> Tensor:
    forget()
    layer: LayerView = _modules[handle]
    return _as_declared(layer, layer.compute(x, _moment(layer, x, step), activation))


@_run.register_fake
def _shape(x: Tensor, step: Sequence[Tensor], handle: int, activation: str) -> Tensor:
    layer: LayerView = _modules[handle]
    return _as_declared(layer, x.new_empty(layer.output_shape(x)))


@torch.library.custom_op("reelquant::opaque", mutates_args=())
def _opaque(x: Tensor, slot: Tensor, handle: int) -> Tensor:
    return x.new_zeros(_modules[handle].output_shape(x))


@torch.library.custom_op("reelquant::tokenwise", mutates_args=())
def _run_tokenwise(x: Tensor, step: Sequence[Tensor], handle: int) -> Tensor:
    forget()
    module = _modules[handle]
    if step:
        module.reelquant_layers()[0].clock[0].follow(step)
    return module.forward(x)  # its hooks are in the graph


@_run_tokenwise.register_fake
def _shape_tokenwise(x: Tensor, step: Sequence[Tensor], handle: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], _modules[handle].reelquant_width)


def _moment(layer: LayerView, x: Tensor, step: Sequence[Tensor]) -> Moment:
    """The state of the clock. Values that the layer does not need are not read, so that nothing waits for the device."""
    if not step:
        return Moment()
    layout, (slot, stored, protected, half) = layer.layout, step
    exact, half = bool(stored) if layout.table else False, int(half) if layout.cfg_halves else ANY
    if not layer.clock[0].changes_bits:
        return Moment(slot if x.is_cuda and not exact else int(slot), exact, half=half)
    return Moment(int(slot), exact, bool(protected), half, widths=layer.clock[0].at(int(slot), layer.bits_group))


def _as_declared(layer: LayerView, out: Tensor) -> Tensor:
    """In the memory format that the graph was told; an input without a batch axis is always contiguous."""
    batched = layer.output_format == torch.contiguous_format or out.ndim == len(layer.weight_shape)
    return out.contiguous(memory_format=layer.output_format) if batched else out.contiguous()
