"""Models that diffusers builds out of a quantized one: they are quantized, too, and must say so before they are saved."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from reelquant.checkpoint import adopt
from reelquant.nn import quantized_layers, start_runtime

KEY = "quantization_config"


def guard(unets: ModuleType) -> None:
    """Let the motion UNet of AnimateDiff describe the layers that it takes over from a quantized UNet for pictures.

    Args:
        unets: ``diffusers.models.unets.unet_motion_model``.
    """
    kind: Any = unets.UNetMotionModel
    build = kind.from_unet2d.__func__
    if hasattr(build, "__wrapped__"):
        return

    @functools.wraps(build)
    def built(cls: Any, unet: Any, *args: Any, **kwargs: Any) -> Any:
        model = build(cls, unet, *args, **kwargs)
        if quantized_layers(model):
            model.register_to_config(**{KEY: unet.config.get(KEY)})
            adopt(model)
            model.train(unet.training)
            start_runtime(model)
        return model

    kind.from_unet2d = classmethod(built)
