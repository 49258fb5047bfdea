"""What pipelines of diffusers ask of models of transformers that newer versions of it no longer have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn


def bridged(pipe: Any) -> Any:
    """The pipeline, with text encoders that answer by their old attributes.

    I2VGen-XL reads ``text_encoder.text_model.final_layer_norm``; since version 5 of transformers, the norm is an attribute of the encoder
    itself. Pipelines that load adapters are left as they are: diffusers tells the layout of an encoder, and with it the names in an
    adapter, by that very attribute. (Stable Diffusion reads the norm with ``clip_skip`` only, which fails there in diffusers, too.)
    """
    if hasattr(pipe, "load_lora_weights"):
        return pipe
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and hasattr(part, "final_layer_norm") and not hasattr(part, "text_model"):
            part.text_model = SimpleNamespace(final_layer_norm=part.final_layer_norm)
    return pipe
