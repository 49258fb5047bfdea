"""Activations that follow a quantized layer at once are computed while its output is still in registers; gates of its halves in one pass.

Which modules are "a layer, then an activation", or "then a gate", is found by trying: a module whose only parameters are those of one
quantized linear layer is called with a few numbers, and if its answer is an activation of the layer's answer, or one half of it times an
activation of the other, that is what it is. No class is listed by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reelquant.kernels.activations import ACTIVATIONS
from reelquant.kernels.gates import gate
from reelquant.nn.around.class_patch import ClassPatch, patch, unpatch, untouched
from reelquant.nn.around.graph import is_tracing
from reelquant.nn.layer_classes import QuantLinear
from reelquant.nn.layers import QuantLayer


class Fused(ClassPatch):
    """A module that is a layer and an activation.

    Attributes:
        reelquant_layer: name of its layer.
        reelquant_activation: of :data:`~reelquant.kernels.activations.ACTIVATIONS`.
    """

    reelquant_layer: str
    reelquant_activation: str

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer: Any = getattr(self, self.reelquant_layer)
        if args or kwargs or self.training or not untouched([layer]):  # adapters come in between
            return super().forward(hidden_states, *args, **kwargs)
        return layer.activated(hidden_states, self.reelquant_activation)


class Gated(ClassPatch):
    """A module that is a layer and a gate: one half of the layer's output times an activation of the other.

    Attributes:
        reelquant_layer: name of its layer.
        reelquant_gate: the activation.
        reelquant_first: whether it is the first half that is activated.
    """

    reelquant_layer: str
    reelquant_gate: str
    reelquant_first: bool

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer: Any = getattr(self, self.reelquant_layer)
        if args or kwargs or self.training or torch.compiler.is_compiling() or is_tracing():
            return super().forward(hidden_states, *args, **kwargs)
        # Hooks and adapters of the layer run in its own call, so an offloaded model computes the same bits.
        return gate(layer(hidden_states), self.reelquant_gate, self.reelquant_first)


def fuse_activations(model: nn.Module) -> list[str]:
    """Fuse every layer with the activation or gate that follows it inside of the same module; names of those modules."""
    found = []
    for name, module in model.named_modules():
        if (child := _only_layer(module)) is None or (seen := _seen(module, child[1])) is None:
            continue
        if (activation := _activation(*seen)) is not None:
            patch(Fused, module, reelquant_layer=child[0], reelquant_activation=activation)
        elif (gating := _gate(*seen)) is not None:
            patch(Gated, module, reelquant_layer=child[0], reelquant_gate=gating[0], reelquant_first=gating[1])
        else:
            continue
        found.append(name)
    return found


def part_activations(model: nn.Module) -> None:
    """Undo :func:`fuse_activations`."""
    unpatch(Fused, model)
    unpatch(Gated, model)


def _only_layer(module: nn.Module) -> tuple[str, QuantLinear] | None:
    """The one quantized linear layer that a module holds, if it holds nothing else that has numbers."""
    if isinstance(module, QuantLayer | Fused | Gated):
        return None
    children = [(name, child) for name, child in module.named_children() if isinstance(child, QuantLinear)]
    if len(children) != 1 or children[0][1].weight.device.type == "meta":
        return None
    own = {id(tensor) for tensor in (*children[0][1].parameters(), *children[0][1].buffers())}
    return children[0] if all(id(tensor) in own for tensor in (*module.parameters(), *module.buffers())) else None


@torch.no_grad()
def _seen(module: nn.Module, layer: QuantLinear) -> tuple[Tensor, Tensor] | None:
    """Probe with random input; return (layer output, module output), or None if the module alters the input first."""
    seen: list[tuple[Any, Tensor]] = []
    handle = layer.register_forward_hook(lambda layer, args, output: seen.append((args, output)))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.weight.device)
    x = x if layer.bias is None else x.to(layer.bias.dtype)
    try:
        answer = module(x)
    except Exception:  # a module that wants something else than one tensor
        return None
    finally:
        handle.remove()
    if len(seen) != 1 or not seen[0][0] or not torch.equal(seen[0][0][0], x) or not isinstance(answer, Tensor):
        return None
    return (seen[0][1], answer) if bool((seen[0][1] != 0).any()) else None


@torch.no_grad()
def _activation(output: Tensor, answer: Tensor) -> str | None:
    """The activation that makes the answer of the output, or None if it is something else."""
    fitting = (name for name, function in ACTIVATIONS.items() if torch.equal(function(output), answer))
    return next(fitting, None)


@torch.no_grad()
def _gate(output: Tensor, answer: Tensor) -> tuple[str, bool] | None:
    """The activation that one half of the output is multiplied with, and whether it is that of the first half."""
    if output.shape[-1] % 2:
        return None
    halves = output.chunk(2, -1)
    for name, function in ACTIVATIONS.items():
        for first in (True, False):
            if torch.equal(function(halves[0 if first else 1]) * halves[1 if first else 0], answer):
                return name, first
    return None
