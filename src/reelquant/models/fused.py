"""Fused projections (``fuse_qkv_projections``) that a UNet keeps after it was told to part them again.

diffusers' ``Attention`` layers make ``to_qkv``, ``to_kv`` and ``to_added_qkv`` beside the layers that they were made of.
``unfuse_qkv_projections`` of a UNet puts the old processors back, which use the old layers, and leaves the fused ones where they are: they
take memory, nothing calls them, and a class that is built from its config has no such layers (diffusers 0.40 to 0.42). Newer attention
layers (``AttentionModuleMixin``) remove them.
"""

from __future__ import annotations

from torch import nn

FUSED = ("to_qkv", "to_kv", "to_added_qkv")


def drop_unused_projections(model: nn.Module) -> list[str]:
    """Remove fused layers that no processor of their attention uses.

    Returns:
        their names; empty if projections are fused at present or never were.
    """
    from diffusers.models.attention_processor import Attention

    dropped: list[str] = []
    for name, layer in model.named_modules():
        if isinstance(layer, Attention) and layer.fused_projections and not _uses_fused(layer.processor):
            left = [attribute for attribute in FUSED if hasattr(layer, attribute)]
            for attribute in left:
                delattr(layer, attribute)
            layer.fused_projections = False
            dropped += [f"{name}.{attribute}" for attribute in left]
    return dropped


def _uses_fused(processor: object) -> bool:
    """diffusers names every such processor of its ``Attention`` so."""
    return type(processor).__name__.startswith("Fused")
