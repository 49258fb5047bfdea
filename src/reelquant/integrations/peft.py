"""Adapters of peft beside quantized layers: they run as they are, once convolutions are counted right; what would read or write the float
weight is refused.

peft merges by adding to ``layer.weight`` and has no hook for other libraries. With ``safe_merge`` it casts the sum of a packed weight and a
delta to integers, and says nothing.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

from reelquant._errors import UnsupportedError
from reelquant.nn import QuantLayer
from reelquant.nn.refusals import FUSING

CHECK = "check_adapters_to_merge"  # what every kind of adapter asks before it merges


def guard(layers: ModuleType) -> None:
    """Let adapters be put beside packed convolutions; refuse merges into quantized layers, variants of LoRA that need the float weight, and
    adapters of layers whose channels are not the float model's.

    Args:
        layers: ``peft.tuners.lora.layer``.
    """
    check = getattr(layers, CHECK)
    if getattr(check, "reelquant", False):
        return

    @functools.wraps(check)
    def checked(module: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(module.get_base_layer(), QuantLayer):
            raise UnsupportedError(FUSING)
        return check(module, *args, **kwargs)

    checked.reelquant = True  # type: ignore[attr-defined]
    for name, module in list(sys.modules.items()):
        if name.startswith("peft.") and getattr(module, CHECK, None) is check:
            setattr(module, CHECK, checked)
    _guard_variants(layers.LoraLayer)
    layers._ConvNd._kernel_dim = property(_axes, lambda self, value: None)  # peft counts the axes of the weight, and ours is packed


def _axes(convolution: Any) -> int:
    return 2 + len(convolution.get_base_layer().kernel_size)


def _guard_variants(layer: Any) -> None:
    resolve = layer.resolve_lora_variant

    @functools.wraps(resolve)
    def resolved(self: Any, **kwargs: Any) -> Any:
        variant, base = resolve(self, **kwargs), self.get_base_layer()
        if isinstance(base, QuantLayer) and base.layout.weight.removed & {"rows", "columns"}:
            raise UnsupportedError(
                f"this adapter was trained with other channels than {base} has: its rows or columns were mixed before some were left out. "
                "Merge it before quantizing: reelquant.quantize(pipe, recipe, lora={file: scale})"
            )
        if variant is not None and isinstance(base, QuantLayer):
            raise UnsupportedError(
                f"this adapter's type is {type(variant).__name__.removesuffix('Variant')}, which needs the float weight of its layer; "
                "beside quantized layers plain LoRA runs. Merge it before quantizing: reelquant.quantize(pipe, recipe, lora={file: scale})"
            )
        return variant

    layer.resolve_lora_variant = resolved
