"""Models that diffusers builds out of a quantized one: they are quantized, too, and must say so before they are saved."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from reelquant.checkpoint import adopt
from reelquant.nn import quantized_layers, start_runtime

KEY = "quantization_config"
METHODS = ("from_unet2d", "from_unet", "from_transformer")


def guard(module: ModuleType) -> None:
    """Let models describe the layers that they take over from a quantized one when they are built.

    Args:
        module: one of :data:`reelquant.integrations.register.REBUILT`.
    """
    for kind in list(vars(module).values()):
        for name in METHODS:
            method = vars(kind).get(name) if isinstance(kind, type) and kind.__module__ == module.__name__ else None
            if isinstance(method, classmethod) and not hasattr(method.__func__, "reelquant"):
                setattr(kind, name, classmethod(_describing(method.__func__)))


def _describing(build: Any) -> Any:
    @functools.wraps(build)
    def built(cls: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        model = build(cls, source, *args, **kwargs)
        if quantized_layers(model):
            model.register_to_config(**{KEY: source.config.get(KEY)})
            adopt(model)
            model.train(source.training)
            start_runtime(model)
        return model

    built.reelquant = True  # type: ignore[attr-defined]
    return built
