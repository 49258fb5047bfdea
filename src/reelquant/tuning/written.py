"""The recipe of a tuned pipeline."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import yaml
from torch import nn

from reelquant.reuse import BlockReuse

USELESS = ("every",)  # beside 'at'


def recipe_text(denoiser: nn.Module, stage: BlockReuse) -> str:
    """YAML that ``--recipe`` reads: quantize as this model was quantized, and reuse as it was tuned.

    Calibration then sees the model that reuses, so scales fit what layers read at the computed steps.
    """
    stored = _stored_recipe(denoiser)
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(stage).items() if key not in USELESS}
    steps = [{"reuse": "blocks", **options}, *(step for step in stored.get("steps", []) if "reuse" not in step)]
    return yaml.safe_dump({**stored, "name": f"{stored.get('name', 'own')}-tuned", "steps": steps}, sort_keys=False, width=120)


def _stored_recipe(denoiser: nn.Module) -> dict[str, Any]:
    """What the configuration of a quantized model says of its recipe."""
    stored: Any = getattr(getattr(denoiser, "config", None), "quantization_config", None) or {}
    return dict((stored if isinstance(stored, dict) else stored.to_dict()).get("recipe") or {})
