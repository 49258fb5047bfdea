"""What graphs of another runtime cannot do, said before anything is computed."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from reelquant._errors import UnsupportedError
from reelquant.kernels import not_taken
from reelquant.nn import quantized_layers
from reelquant.nn.around.attention import around_attention, rounded_attention

TAKES = frozenset(
    {"input", "shift", "scale", "rotate", "mix", "window", "slots", "table", "unused", "step_invariant", "kept", "rows", "columns"}
)
"""Features of layers (:attr:`reelquant.nn.QuantLayer.features`) that :mod:`reelquant.graphs.convert` emits."""
BACK = "reelquant.configure(pipe, runtime='torch')"


def refuse_model(model: nn.Module) -> None:
    """Refuse models that are more than their layers and numbers.

    Raises:
        UnsupportedError: naming what is in the way.
    """
    _refuse_attention(model)
    for name, layer in quantized_layers(model).items():
        if unknown := not_taken(layer.features, TAKES):
            _refuse(model, f"'{name}' has {unknown}", "use runtime='torch', or a recipe without that")
    for name, module in model.named_modules():
        if hooked(module):
            _refuse(
                model, f"hooks that offload, cache or cast act on {repr(name) if name else 'it'}", "remove them, or use runtime='torch'"
            )
        if module is not model and "forward" in vars(module):
            _refuse(model, f"the forward of '{name}' was replaced, as caches do", "use runtime='torch'")
        if module is not model and (module._forward_hooks or module._forward_pre_hooks):
            _refuse(model, f"a hook watches '{name}', and a graph does not call hooks", "remove it, or use runtime='torch'")
    devices = {str(one.device) for one in (*model.parameters(), *model.buffers())}
    if devices != {"cpu"}:
        _refuse(model, f"it lies on {', '.join(sorted(devices))}", "move it with model.to('cpu') first")
    _refuse_adapters(model)


def refuse_call(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Refuse calls that graphs cannot answer.

    Raises:
        UnsupportedError: naming what is in the way.
    """
    if torch.compiler.is_compiling():
        _refuse(model, "it is called inside of torch.compile", f"compile it after {BACK}")
    if hooked(model):
        _refuse(model, "offloading or caching was switched on", f"call {BACK} before")
    _refuse_adapters(model)
    _refuse_attention(model)
    if torch.is_grad_enabled():
        asked = model.training or any(one.requires_grad for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor))
        if asked:
            _refuse(model, "gradients are asked for", f"call {BACK} to train adapters, or run it under torch.no_grad()")


def hooked(module: nn.Module) -> bool:
    """Whether accelerate or diffusers acts on calls of a module; diffusers leaves empty registries wherever a pipeline has been called."""
    registry = getattr(module, "_diffusers_hook", None)
    return hasattr(module, "_hf_hook") or bool(getattr(registry, "hooks", None))


def _refuse_adapters(model: nn.Module) -> None:
    if adapters := getattr(model, "peft_config", None):
        _refuse(model, f"it has adapters ({', '.join(adapters)})", f"unload them, merge them before quantizing, or call {BACK}")


def _refuse_attention(model: nn.Module) -> None:
    if around_attention(model):
        _refuse(model, "its attention is reused, or follows the number of tokens", "use runtime='torch', or a recipe without that")
    if rounded := rounded_attention(model):
        _refuse(model, f"its attention is asked for with {rounded.plan}", "call reelquant.configure(pipe, attention='float') first")


def _refuse(model: nn.Module, why: str, instead: str) -> NoReturn:
    raise UnsupportedError(f"{type(model).__name__} does not run as an OpenVINO graph: {why}; {instead}")
