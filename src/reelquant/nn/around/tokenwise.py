"""Modules that treat every token alone (feed-forwards) run a block of tokens at a time.

What lies between their layers, four to eight times as wide as a token, then stays in the cache and is never held for a whole clip. Which
modules these are is found by trying: all their numbers are those of quantized linear layers, and a token's answer does not change with the
other tokens or with its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reelquant.nn.around.class_patch import ClassPatch, patch, unpatch, untouched, unwatched
from reelquant.nn.around.graph import call_tokenwise, handle_of
from reelquant.nn.layer_classes import QuantLinear
from reelquant.nn.layers import QuantLayer

ACTIVATIONS_AT_ONCE = 1 << 22  # numbers between two layers at a time: a share of the last cache, and memory that the allocator keeps
ROWS = 64  # tokens in a block are a multiple of it, which suits the products
MIXING = frozenset({F.scaled_dot_product_attention, torch.bmm, torch.baddbmm, torch.softmax, torch.Tensor.softmax, F.softmax})


class Tokenwise(ClassPatch):
    """A module that treats every token alone.

    Attributes:
        reelquant_rows: tokens at a time.
        reelquant_width: channels of the answer.
        reelquant_names: its layers.
        reelquant_between: its other modules; hooks on them want to see all tokens.
        reelquant_handle: by which compiled graphs find it.
    """

    reelquant_rows: int
    reelquant_width: int
    reelquant_names: list[str]
    reelquant_between: list[str]
    reelquant_handle: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layers = self.reelquant_layers()
        tokens = math.prod(hidden_states.shape[:-1])
        if args or kwargs or self.training or tokens <= self.reelquant_rows or not self.reelquant_alone(layers):
            return super().forward(hidden_states, *args, **kwargs)
        clock = layers[0].clock
        if torch.compiler.is_compiling():
            return call_tokenwise(self.reelquant_handle, hidden_states, clock)
        if clock and not clock[0].reads_stored:  # what computes such a step may be made for every call
            return super().forward(hidden_states)
        return self.reelquant_in_blocks(hidden_states)

    def reelquant_layers(self) -> list[Any]:
        """Its quantized layers, or what has been put in their place."""
        return [self.get_submodule(name) for name in self.reelquant_names]

    def reelquant_alone(self, layers: list[Any]) -> bool:
        """True if no hook or wrapper would observe the chunking."""
        return untouched(layers) and all(unwatched(self.get_submodule(name)) for name in self.reelquant_between)

    def reelquant_in_blocks(self, x: Tensor) -> Tensor:
        """The answer to ``[..., tokens, channels]``, in blocks of nearly the same size."""
        flat = x.reshape(1, -1, x.shape[-1])
        tokens = flat.shape[1]
        step = math.ceil(tokens / math.ceil(tokens / self.reelquant_rows) / ROWS) * ROWS
        out = x.new_empty(1, tokens, self.reelquant_width)
        for start in range(0, tokens, step):
            out[:, start : start + step] = super().forward(flat[:, start : start + step])
        return out.view(*x.shape[:-1], self.reelquant_width)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.reelquant_handle = handle_of(self)


def block_tokens(model: nn.Module) -> list[str]:
    """Run every module that treats tokens alone in blocks; their names."""
    found: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found) or isinstance(module, Tokenwise):
            continue
        layers = _layers(module)
        if layers is not None and (width := answer_width(module, layers)) is not None:
            rows = tokens_at_once(layers)
            names = [part for part, child in module.named_modules() if isinstance(child, QuantLinear)]
            between = [part for part, _ in module.named_modules() if part and part not in names]
            members = {"reelquant_rows": rows, "reelquant_width": width, "reelquant_names": names, "reelquant_between": between}
            patch(Tokenwise, module, **members)
            module.reelquant_handle = handle_of(module)
            found.append(name)
    return found


def tokens_at_once(layers: Sequence[nn.Linear]) -> int:
    """Tokens in a block of a module with these layers."""
    return max(ACTIVATIONS_AT_ONCE // max(layer.out_features for layer in layers) // ROWS, 1) * ROWS


def unblock_tokens(model: nn.Module) -> None:
    """Undo :func:`block_tokens`."""
    unpatch(Tokenwise, model)


def _layers(module: nn.Module) -> list[QuantLinear] | None:
    """The quantized linear layers of a module that has two or more, and no other numbers; none if the place in the batch matters."""
    layers = [child for child in module.modules() if isinstance(child, QuantLayer)]
    if isinstance(module, QuantLayer) or len(layers) < 2:
        return None
    linear = [layer for layer in layers if isinstance(layer, QuantLinear) and not (layer.layout.table or layer.layout.cfg_halves)]
    if len(linear) < len(layers) or any(layer.weight.device.type == "meta" for layer in linear):
        return None
    own = {id(tensor) for layer in linear for tensor in (*layer.parameters(), *layer.buffers())}
    return linear if all(id(tensor) in own for tensor in (*module.parameters(), *module.buffers())) else None


class _NoMixing(TorchFunctionMode):
    """Refuses what mixes tokens by design, in case that the few tokens of a trial do not show it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MIXING:
            raise TypeError(f"{func.__name__} mixes tokens")
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def answer_width(module: nn.Module, layers: Sequence[nn.Linear]) -> int | None:
    """Channels of the answer if a module treats tokens alone, else None; its layers may be float ones."""
    first = layers[0]
    x = torch.randn(1, 4, first.in_features, generator=torch.Generator().manual_seed(0)).to(first.weight.device)
    x = x if first.bias is None else x.to(first.bias.dtype)
    try:
        with _NoMixing():
            answer = module(x)
            alone = isinstance(answer, Tensor) and answer.shape[:2] == x.shape[:2] and answer.ndim == 3 and answer.dtype == x.dtype
            alone = alone and torch.equal(module(x.flip(1)), answer.flip(1)) and bool((answer != 0).any())
            for factor in (-0.1, -1.0, -50.0) if alone else ():
                other = torch.cat([x[:, :1] * factor, x[:, 1:]], 1)
                alone = alone and torch.equal(module(other)[:, 1:], answer[:, 1:])
    except Exception:  # a module that wants something else than one tensor of tokens
        return None
    return answer.shape[2] if alone else None
