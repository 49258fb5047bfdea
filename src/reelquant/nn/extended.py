"""Layers with a forward of their own: convolutions that pad, split or cache their input and then call the stock forward.

Such a layer keeps its class's forward; the ``super().forward`` inside becomes the quantized one. :data:`KNOWN` lists the classes of
diffusers that were read. Other classes are judged by the names in their bytecode, which is logged once per class.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import nn

from reelquant.nn.layer_classes import LAYERS
from reelquant.nn.layers import QuantLayer

logger = logging.getLogger(__name__)
_VAE = "diffusers.models.autoencoders"
KNOWN: dict[str, bool] = {
    f"{_VAE}.autoencoder_kl_wan.WanCausalConv3d": True,
    f"{_VAE}.autoencoder_kl_qwenimage.QwenImageCausalConv3d": True,
    f"{_VAE}.autoencoder_kl_qwenimage21.QwenImage21CausalConv3d": True,
    f"{_VAE}.autoencoder_kl_magvit.EasyAnimateCausalConv3d": True,
    f"{_VAE}.autoencoder_kl_cosmos.CosmosCausalConv3d": True,
    f"{_VAE}.autoencoder_kl_cogvideox.CogVideoXSafeConv3d": True,
    f"{_VAE}.autoencoder_kl_kvae_video.KVAESafeConv3d": True,
    f"{_VAE}.autoencoder_kandinsky6_sr.Kandinsky6SRSafeConv3d": True,
    f"{_VAE}.autoencoder_kl_minimax_h3.MiniMaxH3VideoCausalConv3d": False,
    f"{_VAE}.autoencoder_mmaudio.MMAudioMPConv1d": False,
}
"""Class of a convolution -> whether it reaches its weight through ``super().forward`` alone (diffusers 0.40 to 0.42)."""


def quantized_class(module: nn.Module) -> Any | None:
    """The quantized counterpart of a float layer, or None if there is none.

    Subclasses count if they keep the stock forward; those of convolutions also if :func:`prepares_input`.
    """
    for kind, replacement in LAYERS.items():
        if isinstance(module, kind) and not isinstance(module, QuantLayer):
            forward = type(module).forward
            if forward in (kind.forward, _compatible_forward(type(module))):
                return replacement
            return _extended(type(module), replacement) if prepares_input(module) else None
    return None


def float_class(layer: QuantLayer) -> type[nn.Module]:
    """The class of the float layer that a quantized one stands for; built like its first base class in :data:`LAYERS`."""
    return type(layer).__mro__[1] if type(layer) not in LAYERS.values() else next(kind for kind in LAYERS if isinstance(layer, kind))


def prepares_input(module: nn.Module) -> bool:
    """Whether this is a convolution that pads its input itself and reaches its weight through ``super().forward`` alone."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    kind = type(module)
    known = KNOWN.get(f"{kind.__module__}.{kind.__qualname__}")
    return _calls_stock_forward(kind) if known is None else known


@functools.cache
def _calls_stock_forward(kind: type[nn.Module]) -> bool:
    """Whether the bytecode of ``forward`` names ``super`` and ``forward`` and not ``weight``; logged, because it is a guess."""
    code = getattr(kind.forward, "__code__", None)
    names = set() if code is None else set(code.co_names)
    guess = {"super", "forward"} <= names and "weight" not in names
    if guess:
        logger.info("%s is not a known convolution; its forward seems to call the stock one, so it is quantized", kind.__qualname__)
    return guess


@functools.cache
def _extended(kind: type[nn.Module], replacement: Any) -> Any:
    """A quantized layer with the forward of ``kind``, whose ``super().forward`` is the quantized one."""

    def like(cls: Any, module: nn.Module, layout: Any, device: Any = None) -> Any:
        new = replacement.like(module, layout, device)
        new.__class__ = cls
        new.__dict__ |= own_attributes(module, new)
        return new

    return type(f"Quant{kind.__name__}", (kind, replacement), {"like": classmethod(like)})


def own_attributes(module: nn.Module, stock: nn.Module) -> dict[str, Any]:
    """What a subclass keeps on its layers beside the attributes of the ``stock`` class: paddings, caches."""
    return {name: value for name, value in vars(module).items() if name not in vars(stock)}


def _compatible_forward(kind: type[nn.Module]) -> Any:
    """diffusers' ``LoRACompatible*`` layers add an unused ``scale`` argument to the stock forward."""
    return kind.forward if kind.__name__.startswith("LoRACompatible") else None
