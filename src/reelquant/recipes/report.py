"""What was done, with the figures that prove it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reelquant.recipes.build import LayerRecord
from reelquant.recipes.search import Trial


@dataclass
class Report:
    """The proof of one quantization. Sizes are bytes of the denoiser; ``kept`` maps a reason to the layers it holds for.

    Attributes:
        recipe, digest: name and content hash of the recipe.
        denoiser, component: class and name of the quantized component.
        layers: one record per quantized layer.
        kept: reason -> names of layers that stay float.
        bytes_float, bytes_quantized: storage of the quantized layers, in float32 and now (codes, scales, biases, shifts).
        bytes_tables: tables of temporal outputs, on top of ``bytes_quantized``.
        bytes_model_float, bytes_model: the whole denoiser.
        kernel: kernel name -> number of layers.
        simulated: True if any layer computes in float arithmetic although it is stored in few bits.
        latent_psnr: of the calibration clips' final latents against float, dB; None for data-free recipes.
        trials: what the search tried.
        seconds: time per phase.
        adapters: file name -> scale of what was merged into the float weights before.
    """

    recipe: str
    digest: str
    denoiser: str
    component: str
    layers: list[LayerRecord] = field(default_factory=list)
    kept: dict[str, list[str]] = field(default_factory=dict)
    bytes_float: int = 0
    bytes_quantized: int = 0
    bytes_tables: int = 0
    bytes_model_float: int = 0
    bytes_model: int = 0
    kernel: dict[str, int] = field(default_factory=dict)
    simulated: bool = True
    latent_psnr: float | None = None
    trials: list[Trial] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    seed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """How many times smaller the quantized layers are than in float32, scales and all."""
        return self.bytes_float / max(self.bytes_quantized, 1)

    def mean(self, name: str, role: str | None = None) -> float | None:
        """Mean of a figure over the layers (of one role) that have it."""
        values = [getattr(x, name) for x in self.layers if getattr(x, name) is not None and role in (None, x.role)]
        return sum(values) / len(values) if values else None

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return asdict(self) | {"ratio": self.ratio}

    def save(self, path: str | Path) -> None:
        """Write ``report.json``."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2, sort_keys=True) + "\n")
