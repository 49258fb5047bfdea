"""What a whole quantized denoiser has beside its layers: faster attention, fused activations, feed-forwards in blocks of tokens, outputs
that are reused from step to step, refusals."""

from __future__ import annotations

import torch
from torch import nn

from reelquant.kernels import check_backend, current_backend
from reelquant.kernels.attention import AttentionQuant
from reelquant.nn.around.attention import ask_attention, round_attention, rounded_attention, start_attention, stop_attention
from reelquant.nn.around.attention_plan import AttentionPlan
from reelquant.nn.around.fuse import fuse_activations, part_activations
from reelquant.nn.around.tokenwise import block_tokens, unblock_tokens
from reelquant.nn.casting import accept_own_dtype, refuse_own_dtype
from reelquant.nn.host_memory import trim_heap
from reelquant.nn.refusals import allow, refuse
from reelquant.nn.residency import many_at_once
from reelquant.nn.swap import quantized_layers


def start_runtime(model: nn.Module, attention: AttentionPlan | None = None) -> None:
    """Switch it on, twice is once; nothing is made faster if the reference was asked for.

    Args:
        model: a quantized model.
        attention: what its attention rounds, and checkpoints say that it does; None leaves that as it is.
    """
    refuse(model)
    accept_own_dtype(model)
    _at_first_call(model, True)
    if attention is not None:
        round_attention(model, attention)
        ask_attention(model, attention)
    if current_backend() == "auto":
        start_attention(model)
        fuse_activations(model)
        with many_at_once():
            block_tokens(model)
        _keep_outputs(model, True)


def stop_runtime(model: nn.Module) -> None:
    """Undo :func:`start_runtime`."""
    allow(model)
    refuse_own_dtype(model)
    _at_first_call(model, False)
    stop_attention(model)
    unblock_tokens(model)
    part_activations(model)
    _keep_outputs(model, False)


def _keep_outputs(model: nn.Module, wanted: bool) -> None:
    """Let layers that see only the prompt reuse their outputs."""
    for layer in quantized_layers(model).values():
        plain = layer.layout.slots == 1 and not layer.layout.table
        layer.keeps = wanted and layer.layout.step_invariant and plain


def _at_first_call(model: nn.Module, wanted: bool) -> None:
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _prepare_layers]:
        del model._forward_pre_hooks[key]
    if wanted:
        model.register_forward_pre_hook(_prepare_layers)


def _prepare_layers(model: nn.Module, args: object) -> None:
    """Prepare all layers before the first activation is in memory; repacking them between activations would leave holes in the heap.

    Only on CPUs, and only if the model is not offloaded (offloading puts a ``forward`` into modules). All other layers are prepared when
    they run. Layers that a graph of another runtime computes are left as they are.
    """
    if torch.compiler.is_compiling():
        return
    _at_first_call(model, False)
    if any("forward" in vars(module) for module in model.modules()):
        return
    with many_at_once():
        for layer in quantized_layers(model).values():
            if layer.weight.device.type == "cpu" and not layer.layout.table and layer.runtime_kernel is None:
                layer.prepare()
    trim_heap()


def set_attention(model: nn.Module, plan: AttentionPlan | AttentionQuant | None) -> None:
    """Let one model's attention round its operands, from its next call on, or leave them in float."""
    layers = quantized_layers(model).values()
    round_attention(model, plan, next((layer.kernels for layer in layers), "auto"))


def set_kernels(model: nn.Module, name: str) -> None:
    """Let one model be computed by ``reference`` or ``auto`` kernels, from its next call on; other models are left alone.

    Raises:
        RecipeError: if there are no kernels of that name.
    """
    check_backend(name)
    stop_runtime(model)
    for layer in quantized_layers(model).values():
        layer.release()
        layer.kernels = name
    refuse(model)
    accept_own_dtype(model)
    if (rounded := rounded_attention(model)) is not None:
        round_attention(model, rounded.plan, name)
    if name == "auto":
        start_runtime(model)
