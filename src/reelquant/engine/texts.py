"""Which texts calibrate, and which ones choices and the final check are made on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reelquant.models.probes import probe_texts
from reelquant.recipes.recipe import Calibrate

HELD_OUT_SEED = 100_000  # held-out clips never start from the noise of a calibration clip, nor are their probes those of calibration


def divided(pipe: Any, prompts: Sequence[str], wanted: Calibrate, held_out: int) -> tuple[list[str], list[str]]:
    """Texts of calibration, and held-out texts of two kinds.

    Calibration takes the first prompts and some probes (:mod:`reelquant.models.probes`). The check must not be of the same texts: half of
    it are prompts that did not calibrate, the other half probes of other words. If no prompts are left, calibrated ones stand in, from
    other noise.

    Args:
        prompts: the texts that were given; empty if there are none, and then nothing is made up for them.
        held_out: how many texts choices and the check are made on.
    """
    if not prompts:
        return [], []
    texts, rest = list(prompts[: wanted.written]), list(prompts[wanted.written :]) or list(prompts)
    probes = wanted.prompts - wanted.written
    written = rest[: held_out - held_out // 2 if probes else held_out]
    return (
        _spread(texts, probe_texts(pipe, probes, wanted.seed, prompts)),
        written + probe_texts(pipe, held_out - len(written) if probes else 0, wanted.seed + HELD_OUT_SEED, prompts),
    )


def _spread(texts: Sequence[str], probes: Sequence[str]) -> list[str]:
    """Probes evenly among the other texts: runs of the sampler, which take a few texts each, are compared, so they must be of one kind."""
    places = [(number + 0.5) / len(texts) for number in range(len(texts))] + [(number + 0.5) / len(probes) for number in range(len(probes))]
    return [text for _, text in sorted(zip(places, [*texts, *probes], strict=True), key=lambda pair: pair[0])]
