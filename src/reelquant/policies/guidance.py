"""Static scales of inputs for each half of a classifier-free guidance pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from reelquant._errors import CalibrationError, RecipeError
from reelquant.formats import Quantizer
from reelquant.observe import InputStatistics
from reelquant.stages import LayerWork, ModelWork, Stage, StageSite, bound, follows

WORDS = {"joint": None, "separate": {}, "apart": {}}
"""What recipes write under ``guidance``; ``apart`` is the older word for ``separate``."""


@dataclass(frozen=True)
class SeparateGuidance(Stage):
    """Give inputs one scale for calls with the text and one for calls without.

    A layer stores three rows per step: for calls that are not part of a pair, for the first half, for the second.
    Formats that were fitted to samples, and inputs that are the same in both halves, keep one scale.
    """

    statistics: ClassVar[frozenset[str]] = frozenset({"halves"})
    key: ClassVar[str | None] = "guidance"
    default_on: ClassVar[str] = "*"
    takes_on: ClassVar[bool] = False

    @classmethod
    def parse_key(cls, value: Any) -> Mapping[str, Any] | None:
        if value not in WORDS:
            raise RecipeError(f"guidance is 'joint' or 'separate', got {value!r}")
        return WORDS[value]

    def needs(self, site: StageSite) -> frozenset[str]:
        static = site.specs.input is not None and not site.specs.input.dynamic
        return self.statistics if static else frozenset()

    def before_choosing(self, work: ModelWork) -> None:
        if work.guidance is None:
            raise CalibrationError(
                f"this recipe keeps the halves of guidance apart, and the pipeline of '{work.component}' samples without "
                "classifier-free guidance: no call holds its latents twice, and no second call has those of the first; "
                "pass a guidance_scale above 1, or set guidance=joint"
            )
        if work.clock is not None:
            work.clock.pairs, work.clock.latent = work.guidance, work.map.latent_argument

    def solve_layer(self, layer: LayerWork) -> LayerWork:
        spec, seen = layer.site.specs.input, layer.statistics
        if spec is None or seen is None or layer.inputs is None or not _differ(seen):
            return layer
        if spec.range.needs_samples or spec.alternatives or follows(layer.rewrite, seen) is None:
            return layer
        assert seen.halves is not None
        steps = len(layer.timesteps)
        first, second = (bound(spec, layer.rewrite, half, unseen=layer.unseen, steps=steps) for half in seen.halves)
        rows: list[Quantizer] = [one for row in zip(layer.inputs, first, second, strict=True) for one in row]
        return replace(layer, stored_inputs=rows)


def _differ(seen: InputStatistics) -> bool:
    """Whether both halves ran at every step at which the layer ran, and their inputs are not the same by construction."""
    return seen.apart and (seen.features is None or seen.features.varies)
