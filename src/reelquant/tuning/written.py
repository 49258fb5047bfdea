"""What a tuned pipeline has in writing: its recipe, and the report of its quantization."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from reelquant.models.manifest import REPORT
from reelquant.models.pipelines import locate, stored_file
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


@dataclass
class KeptReport:
    """The report that quantizing left beside a pipeline, for a copy of that pipeline.

    Attributes:
        file: where it is.
        bytes_source, bytes_folder: set by who saves; those in the file stay, as weights are the same.
    """

    file: Path
    bytes_source: int | None = None
    bytes_folder: int | None = None

    def save(self, path: str | Path) -> None:
        """Write it beside the copy."""
        shutil.copyfile(self.file, path)


def report_of(model: str | Path) -> KeptReport | None:
    """The report beside a pipeline; None if there is none."""
    file = stored_file(locate(model), REPORT)
    return None if file is None else KeptReport(Path(file))
