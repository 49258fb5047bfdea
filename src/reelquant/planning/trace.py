"""What a model computes and holds in one call, followed on the meta device: no number is computed, every tensor has its true size.

A trace sees each layer and each attention as one piece of work, and everything else operator by operator. The bytes of the tensors that are
alive are added up as they come and go. On a CPU a convolution holds its input and its weight a second time while it runs, in the order that
oneDNN multiplies in: that is among the events, and not in the sum. What other operators hold for themselves is not seen.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from reelquant.planning.heap import Event

CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (torch.conv1d, torch.conv2d, torch.conv3d)
LAYERS: tuple[Callable[..., Tensor], ...] = (F.linear, *CONVOLUTIONS)
ATTENTION = F.scaled_dot_product_attention
GAP = 8
NUMBER = torch.ops.aten._local_scalar_dense.default


@dataclass(frozen=True)
class Shape:
    """A tensor that an operator was given.

    Attributes:
        size, dtype: of the tensor.
        gap: distance of neighbours of the last axis in memory, up to :data:`GAP`; 1 for all others.
    """

    size: tuple[int, ...]
    dtype: torch.dtype
    gap: int = 1

    @property
    def numel(self) -> int:
        return math.prod(self.size)


@dataclass(frozen=True)
class LayerCall:
    """A layer at work: its name and its input."""

    layer: str
    input: Shape


@dataclass(frozen=True)
class AttentionCall:
    """Attention of operands ``[batch, heads, tokens, width]``; whether a mask came along."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    dtype: torch.dtype
    masked: bool


@dataclass(frozen=True)
class OperatorCall:
    """Another operator.

    Attributes:
        operator: its overload, ``aten::mul.Tensor``.
        arguments: of the call; a tensor is its :class:`Shape`.
        options: keyword arguments, as pairs.
        moved: bytes of tensors that it reads and writes.
    """

    operator: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]
    moved: int


Call = LayerCall | AttentionCall | OperatorCall


@dataclass
class Trace:
    """What calls did.

    Attributes:
        peak: most bytes that tensors held at a time, parameters and what the caller holds left out.
        alive: bytes that tensors hold now.
        calls: how often each piece of work was done.
        events: memory that was taken and given back, in order; that of convolutions beside their tensors, too.
    """

    peak: int = 0
    alive: int = 0
    events: list[Event] = field(default_factory=list)
    calls: Counter[Call] = field(default_factory=Counter)


@dataclass(frozen=True)
class Rounding:
    """What quantization changes in what a model holds.

    Attributes:
        codes: bytes of a number of the rounded input, by the layers that round theirs.
        blocks: modules that run a block of tokens at a time: (tokens, channels of the answer), by name.
    """

    codes: Mapping[str, float] = field(default_factory=dict)
    blocks: Mapping[str, tuple[int, int]] = field(default_factory=dict)


NONE = Rounding()


class _Alive(TorchDispatchMode):
    """Counts bytes that are alive, and operators."""

    def __init__(self) -> None:
        super().__init__()
        self.trace, self.times, self.inside = Trace(), 1, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(one, Tensor) and one.is_meta for one in tree_leaves((args, kwargs))):
            if func is NUMBER:
                return _number(args[0].dtype)
            args, kwargs = to_meta((args, kwargs))  # buffers, and what a model makes on the CPU
            for one in tree_leaves((args, kwargs)):
                if isinstance(one, Tensor) and one.untyped_storage()._cdata not in self.known:
                    self.ignore(one)
        out = func(*args, **kwargs)
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and one.is_meta:
                self.count(one)
        if not self.inside:
            self._note(func, args, kwargs, out)
        return out

    def count(self, tensor: Tensor) -> None:
        """A tensor that may be new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size, number = storage.nbytes(), len(self.trace.events)
        self.trace.alive += size
        self.trace.peak = max(self.trace.peak, self.trace.alive)
        self.trace.events.append(Event(number, size))
        weakref.finalize(storage, self._gone, key, number, size)

    def pass_by(self, *sizes: int) -> None:
        """Memory that an operator takes and gives back, beside its tensors."""
        events = self.trace.events
        first = len(events)
        events += [Event(first + place, size) for place, size in enumerate(sizes)]
        events += [Event(first + place, -size) for place, size in enumerate(sizes)]

    def ignore(self, tensor: Tensor) -> None:
        """A tensor that other code holds."""
        storage = tensor.untyped_storage()
        self.known.add(storage._cdata)
        weakref.finalize(storage, self.known.discard, storage._cdata)  # another one may come to lie there

    def _gone(self, key: int, number: int, size: int) -> None:
        self.known.discard(key)
        self.trace.events.append(Event(number, -size))
        self.trace.alive -= size

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if any(info is not None and not info.is_write for info in (one.alias_info for one in func._schema.returns)):
            return  # a view
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        made = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        moved = sum(one.numel() * one.element_size() for one in (*tensors, *made))
        if not tensors or not made:
            return
        options = tuple(sorted((key, _plain(value)) for key, value in kwargs.items()))
        call = OperatorCall(f"{func._schema.name}.{func._overloadname}", _plain(args), options, moved)
        self.trace.calls[call] += self.times


def _plain(value: Any) -> Any:
    """Arguments that can be compared: tensors as their shapes, lists as tuples."""
    if isinstance(value, Tensor):
        last = value.stride(-1) if value.ndim else 1
        return Shape(tuple(value.shape), value.dtype, last if 1 < last <= GAP else 1)
    if isinstance(value, list | tuple):
        return tuple(_plain(one) for one in value)
    return value


class _Work(TorchFunctionMode):
    """Layers and attention, each as one piece of work."""

    def __init__(self, alive: _Alive, names: Mapping[int, str], rounding: Rounding) -> None:
        super().__init__()
        self.alive, self.names, self.rounding = alive, names, rounding

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is ATTENTION:
            return self._attention(*args, **kwargs)
        if func in LAYERS and (name := self.names.get(id(args[1] if len(args) > 1 else kwargs.get("weight")))) is not None:
            return self._layer(name, func, args, kwargs)
        return func(*args, **kwargs)

    def _layer(self, name: str, func: Any, args: Any, kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs["input"]
        self.alive.trace.calls[LayerCall(name, Shape(tuple(x.shape), x.dtype))] += self.alive.times
        bytes_ = self.rounding.codes.get(name)
        codes = None if bytes_ is None else torch.empty(math.ceil(x.numel() * bytes_), dtype=torch.uint8, device="meta")
        with self._as_one():
            made = func(*args, **kwargs)
        del codes
        if func in CONVOLUTIONS:
            self.alive.pass_by(x.nbytes, args[1].nbytes if len(args) > 1 else kwargs["weight"].nbytes)
        return made

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        call = AttentionCall(tuple(query.shape), tuple(key.shape), query.dtype, attn_mask is not None)
        self.alive.trace.calls[call] += self.alive.times
        with self._as_one():
            return query.new_empty(*query.shape[:-1], value.shape[-1])

    @contextmanager
    def _as_one(self) -> Iterator[None]:
        self.alive.inside += 1
        try:
            yield
        finally:
            self.alive.inside -= 1


@contextmanager
def traced(model: nn.Module, rounding: Rounding = NONE) -> Iterator[Trace]:
    """Inside, calls of a model on the meta device are followed.

    Args:
        model: its parameters and buffers may be anywhere; they are not counted.
        rounding: what quantization would change.
    """
    alive = _Alive()
    for tensor in (*model.parameters(), *model.buffers()):
        alive.ignore(tensor)
    names = {id(module.weight): name for name, module in model.named_modules() if isinstance(getattr(module, "weight", None), Tensor)}
    with _in_blocks(model, rounding.blocks, alive), alive, _Work(alive, names, rounding):
        yield alive.trace


@contextmanager
def _in_blocks(model: nn.Module, blocks: Mapping[str, tuple[int, int]], alive: _Alive) -> Iterator[None]:
    """Inside, modules that run a block of tokens at a time do so: one block is followed and counts for all."""
    modules = {name: model.get_submodule(name) for name in blocks}
    for name, module in modules.items():
        rows, width = blocks[name]
        module.forward = _blockwise(module.forward, rows, width, alive)  # pyright: ignore
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _blockwise(forward: Callable[..., Any], rows: int, width: int, alive: _Alive) -> Callable[..., Any]:
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        tokens = math.prod(x.shape[:-1])
        if args or kwargs or tokens <= rows:
            return forward(x, *args, **kwargs)
        count = math.ceil(tokens / rows)
        out = x.new_empty(*x.shape[:-1], width)
        alive.times *= count
        try:
            forward(x.reshape(1, -1, x.shape[-1])[:, : math.ceil(tokens / count)])
        finally:
            alive.times //= count
        return out

    return run


def _number(dtype: torch.dtype) -> Any:
    """What a model is told that asks for the value of a tensor: masks have padding, counts are zero."""
    return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0


def to_meta(value: Any) -> Any:
    """Tensors as tensors without numbers."""
    return tree_map(lambda one: one.to("meta") if isinstance(one, Tensor) else one, value)
