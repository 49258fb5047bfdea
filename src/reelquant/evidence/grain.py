"""Noise in flat areas against the number of denoising steps: in some models errors of weights add up over steps.

Reported by users of 4-bit image models: sigma 2.5 at 4 steps, 7.4 at 50 (mflux#484).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from reelquant.evidence import temporal
from reelquant.evidence.sampling import SamplingJob, Variant

FLAT = (
    "a plain gray wall, evenly lit, nothing moves",
    "a clear blue sky without clouds, static camera",
    "a sheet of white paper that fills the picture",
    "a smooth green screen in a studio, soft light",
)


def growth(job: SamplingJob, variants: Mapping[str, Variant], steps: Sequence[int], texts: Sequence[str]) -> dict[str, Any]:
    """Grain of a few flat clips at several numbers of steps.

    Args:
        job: its store, call and progress are used.
        variants: ``reference`` and ``test``, and any noise floor.
        steps: numbers of denoising steps.
        texts: of flat scenes, one clip each.

    Returns:
        ``{"steps", "reference", "test", ...}``: the mean grain of each variant at each number of steps, in levels of
        255.
    """
    found: dict[str, Any] = {"steps": list(steps), "texts": list(texts)}
    for name, variant in variants.items():
        found[name] = []
        for count in steps:
            flat = replace(
                job,
                prompts=texts,
                seeds=job.seeds[:1] * len(texts),
                call={**job.call, "num_inference_steps": count},
            )
            place = f"{name}-flat-{count}"
            flat.make(place, variant)
            found[name].append(round(fmean(temporal.grain(clip.read()) for clip in flat.clips(place).values()), 4))
    return found
