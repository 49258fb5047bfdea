"""Which texts calibrate, and which ones choices and the final check are made on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from reelquant.models.conditions import check_texts, no_texts, takes_prompt
from reelquant.models.probes import probe_texts
from reelquant.recipes.recipe import Calibrate

HELD_OUT_SEED = 100_000  # held-out clips never start from the noise of a calibration clip, nor are their probes those of calibration


class Texts(NamedTuple):
    """The texts of calibration: those that somebody wrote, and probes, which are sampled after them."""

    written: list[str]
    probes: list[str]


def divided(pipe: Any, prompts: Sequence[str], wanted: Calibrate, held_out: int) -> tuple[Texts, list[str]]:
    """Texts of calibration, and held-out texts of two kinds.

    Calibration takes the first prompts and some probes (:mod:`reelquant.models.probes`). The check must not be of the same texts: half of
    it are prompts that did not calibrate, the other half probes of other words. If no prompts are left, calibrated ones stand in, from
    other noise.

    Args:
        pipe: the pipeline; for one that takes no prompt, texts are empty and only their number counts.
        prompts: the texts that were given; empty if there are none, and then nothing is made up for them.
        held_out: how many texts choices and the check are made on.
    """
    if not prompts:
        return Texts([], []), []
    check_texts(type(pipe), prompts)
    if not takes_prompt(type(pipe)):  # its clips differ in their noise and conditions; there is nothing to probe with
        return Texts(no_texts(wanted.prompts), []), no_texts(held_out)
    texts, rest = list(prompts[: wanted.prompts]), list(prompts[wanted.prompts :]) or list(prompts)
    probes = wanted.probe_count
    written = rest[: held_out - held_out // 2 if probes else held_out]
    return (
        Texts(texts, probe_texts(pipe, probes, wanted.seed, prompts)),
        written + probe_texts(pipe, held_out - len(written) if probes else 0, wanted.seed + HELD_OUT_SEED, prompts),
    )
