"""Lineage: one run of the denoiser with every torch function watched, to know which tensor came from where and who read it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from reelquant._torch_state import version_of
from reelquant.discover.probe import first_tensor, quantizable, run, tensors_in

Key = tuple[int, int]  # serial number of the tensor object, its version (an in-place change makes it another tensor)

# Same values in the same places, perhaps in another dtype or memory order.
_SAME = frozenset({"to", "type_as", "type", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach", "alias"})
# Same values, other shape. The per-channel check in `groups` makes sure the channels stayed what they were.
_VIEWS = frozenset({"view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "squeeze", "unsqueeze"})
# Channel c of the output comes from channel c of the input (or, in a group norm, keeps its place): a seam survives these.
_POINTWISE = frozenset({"silu", "gelu", "relu", "mish", "leaky_relu", "group_norm", "layer_norm", "rms_norm", "dropout", "mul", "add"})
_CAT = frozenset({"cat", "concat", "concatenate"})
# Looks at a tensor without looking at its values.
_METADATA = frozenset(
    {
        "__get__",
        "size",
        "dim",
        "ndimension",
        "numel",
        "stride",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "element_size",
        "get_device",
        "__len__",
        "type",
        "is_signed",
        "storage_offset",
    }
)


@dataclass
class Read:
    """What one layer read in one call.

    Attributes:
        same: the tensor, seen through casts. Layers with equal ``same`` read the very same values.
        root: the tensor, seen through casts and changes of shape: what its producer wrote.
        after: position of the last main layer in its history, -1 if none: it is made of the latent alone.
        made_of: the layers whose outputs it is made of, without another layer in between.
        seam: axis and channel of the concatenation it carries.
        low, high: smallest and largest value per channel, only where a norm wrote the tensor.
    """

    same: Key
    root: Key
    after: int
    seam: tuple[int, int] | None
    shape: tuple[int, ...]
    made_of: frozenset[str] = frozenset()
    low: Tensor | None = None
    high: Tensor | None = None


@dataclass
class Written:
    """The module that wrote a tensor, and the extremes per channel if it is a norm."""

    module: str
    low: Tensor | None = None
    high: Tensor | None = None


@dataclass
class Trace:
    """Everything one watched run tells.

    Attributes:
        reads: what each layer read, call by call, in execution order.
        written: who wrote a tensor, by its root.
        readers: how often something that is not a layer used the values of a tensor, by its root.
        calls: how often each module ran.
        last: position of the last main layer that reached each output tensor of the denoiser.
        shown: the layers whose outputs reach the denoiser's output without another layer in between.
        callers: the modules inside of which each module ran, innermost only; an empty name is the denoiser.
        attention: for every module that asked for attention itself, whether a main layer had a part in the keys of any of its calls.
        heads: for the same modules, heads of the values and channels of a head; zeros where calls differ or heads are no axis.
    """

    reads: dict[str, list[Read]] = field(default_factory=dict)
    written: dict[Key, Written] = field(default_factory=dict)
    readers: Counter[Key] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    last: tuple[int, ...] = ()
    shown: frozenset[str] = frozenset()
    callers: dict[str, set[str]] = field(default_factory=dict)
    attention: dict[str, bool] = field(default_factory=dict)
    heads: dict[str, tuple[int, int]] = field(default_factory=dict)


class _Watch(TorchFunctionMode):
    """Notes every torch function: what it made, of what, and what that says about seams and histories."""

    def __init__(self, found: Trace) -> None:
        super().__init__()
        self.serials: Any = WeakTensorKeyDictionary()
        self.count = 0
        self.same: dict[Key, Key] = {}
        self.root: dict[Key, Key] = {}
        self.seam: dict[Key, tuple[int, int]] = {}
        self.after: dict[Key, int] = {}
        self.made_of: dict[Key, frozenset[str]] = {}
        self.readers, self.attention, self.heads = found.readers, found.attention, found.heads
        self.running = [""]  # modules, the innermost last
        self.in_layer = False

    def key(self, x: Tensor) -> Key:
        serial = self.serials.get(x)
        if serial is None:
            self.count += 1
            serial = self.serials[x] = self.count
        return serial, version_of(x)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        sources = [(x, self.key(x)) for x in tensors_in((args, kwargs))]
        if name == "scaled_dot_product_attention":
            self._note_attention(*(args[place] if len(args) > place else kwargs[word] for place, word in ((1, "key"), (2, "value"))))
        result = func(*args, **kwargs)
        products = list(tensors_in(result)) or ([args[0]] if name == "__setitem__" else [])
        if sources and (products or name not in _METADATA):
            self._note(name, args, kwargs, sources, products)
        return result

    def _note(self, name: str, args: tuple, kwargs: dict, sources: list[tuple[Tensor, Key]], products: list[Tensor]) -> None:
        before = {key for _, key in sources}
        fresh = [x for x in products if self.key(x) not in before]  # `x.to(x.dtype)` gives back x: nothing happened
        if not fresh and products:
            return
        alias = len(fresh) == 1 and sources[0][0].numel() == fresh[0].numel() and name in _SAME | _VIEWS
        for x in fresh:
            self.after[self.key(x)] = max(self.after.get(key, -1) for key in before)
            self.made_of[self.key(x)] = self.layers_of(before)
        if alias:
            self._note_alias(name, sources[0][1], self.key(fresh[0]))
        elif not self.in_layer:
            self.readers.update(self.root.get(key, key) for key in before)
        if name in _CAT:
            self._note_cat(args, kwargs, fresh[0])
        elif len(fresh) == 1 and name in _SAME | _POINTWISE:
            self._pass_seam(sources, fresh[0])

    def _note_attention(self, keys: Tensor, values: Tensor) -> None:
        where = self.running[-1]
        heads = (values.shape[1], values.shape[3]) if values.ndim == 4 else (0, 0)
        self.heads[where] = heads if self.heads.get(where, heads) == heads else (0, 0)
        self.attention[where] = self.attention.get(where, False) or self.after.get(self.key(keys), -1) >= 0

    def layers_of(self, keys: Iterable[Key]) -> frozenset[str]:
        """The layers whose outputs reach one of these tensors without another layer in between."""
        return frozenset().union(*(self.made_of.get(key, frozenset()) for key in keys))

    def _note_alias(self, name: str, source: Key, product: Key) -> None:
        self.root[product] = self.root.get(source, source)
        if name in _SAME:
            self.same[product] = self.same.get(source, source)

    def _note_cat(self, args: tuple, kwargs: dict, product: Tensor) -> None:
        parts = args[0] if args else kwargs.get("tensors", ())
        axis = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        if len(parts) > 1:
            self.seam[self.key(product)] = (axis % product.ndim, parts[0].shape[axis])

    def _pass_seam(self, sources: list[tuple[Tensor, Key]], product: Tensor) -> None:
        for x, key in sources:
            if key in self.seam and x.shape == product.shape:
                self.seam[self.key(product)] = self.seam[key]


def is_norm(module: nn.Module) -> bool:
    """An affine normalisation whose ``weight`` multiplies its output channel by channel (and ``bias``, if any, is added)."""
    from diffusers.models import normalization

    classes = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, normalization.RMSNorm, normalization.MochiRMSNorm)
    return isinstance(module, classes) and isinstance(getattr(module, "weight", None), Tensor)


def extremes(x: Tensor, channel_axis: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest value per channel: they survive reshapes that keep the channels, and few others."""
    flat = x.detach().movedim(channel_axis, 0).flatten(1)
    if not flat.shape[1]:
        nothing = flat.new_full((len(flat),), torch.nan)  # equals nothing, not even that of another empty tensor
        return nothing, nothing
    return flat.amin(1), flat.amax(1)


def channel_axis(module: nn.Module) -> int:
    """Axis of the input channels: 1 for convolutions and group norms, else the last."""
    return 1 if isinstance(module, nn.GroupNorm | _ConvNd) else -1


def trace(denoiser: nn.Module, inputs: dict[str, Any], main: AbstractSet[str]) -> Trace:
    """Run once with everything watched. ``main`` names the layers that depend on the latent. Call inside ``steady``."""
    found = Trace()
    watch = _Watch(found)
    layers = quantizable(denoiser)
    running = watch.running
    with contextlib.ExitStack() as stack:
        for name, module in denoiser.named_modules():
            if name in layers:
                stack.callback(module.register_forward_pre_hook(_on_read(found, watch, name), with_kwargs=True).remove)
            if name:
                stack.callback(module.register_forward_pre_hook(_on_call(found, running, name)).remove)
                stack.callback(module.register_forward_hook(lambda *_: (running.pop(), None)[1]).remove)
                order = _on_layer_done(found, watch, name in main) if name in layers else None
                stack.callback(module.register_forward_hook(_on_write(found, watch, name, order), with_kwargs=True).remove)
        with watch:
            output = run(denoiser, inputs)
        outputs = [watch.key(x) for x in tensors_in(output) if x.is_floating_point()]
        found.last = tuple(watch.after.get(key, -1) for key in outputs)
        found.shown = watch.layers_of(outputs)
    return found


def _on_call(found: Trace, running: list[str], name: str):
    def hook(*_: Any) -> None:
        found.callers.setdefault(name, set()).add(running[-1])
        running.append(name)

    return hook


def _on_read(found: Trace, watch: _Watch, name: str):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = first_tensor(args, kwargs)
        watch.in_layer = True
        if x is None:
            return
        with torch._C.DisableTorchFunction():
            key = watch.key(x)
            root = watch.root.get(key, key)
            read = Read(
                watch.same.get(key, key), root, watch.after.get(key, -1), watch.seam.get(key), tuple(x.shape), watch.layers_of([key])
            )
            writer = found.written.get(root)
            if writer is not None and writer.low is not None:
                read.low, read.high = extremes(x, channel_axis(module))
            found.reads.setdefault(name, []).append(read)

    return hook


def _on_layer_done(found: Trace, watch: _Watch, is_main: bool):
    def done(name: str, output: Tensor) -> None:
        watch.in_layer = False
        watch.made_of[watch.key(output)] = frozenset({name})
        if is_main and name in found.reads:
            watch.after[watch.key(output)] = list(found.reads).index(name)

    return done


def _on_write(found: Trace, watch: _Watch, name: str, layer_done: Any):
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        with torch._C.DisableTorchFunction():
            found.calls[name] += 1
            given = [watch.key(x) for x in tensors_in((args, kwargs))]
            history, layers = max((watch.after.get(key, -1) for key in given), default=-1), watch.layers_of(given)
            for x in tensors_in(output):
                key = watch.key(x)
                watch.after.setdefault(key, history)  # made by something no torch function mode sees
                watch.made_of.setdefault(key, layers)
                if layer_done is not None:
                    layer_done(name, x)
                root = watch.root.get(key, key)
                if root not in found.written:  # inner modules finish first: the leaf wins over the containers that return its output
                    low, high = extremes(x, channel_axis(module)) if is_norm(module) else (None, None)
                    found.written[root] = Written(name, low, high)

    return hook
