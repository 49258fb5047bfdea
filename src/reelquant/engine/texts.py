"""Which texts calibrate, and which ones choices and the final check are made on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from reelquant.models.condition import Condition, Prompts, as_condition, fitted, texts_of
from reelquant.models.conditions import check_texts, no_texts, reads_texts
from reelquant.models.probes import probe_texts
from reelquant.recipes.recipe import Calibrate

HELD_OUT_SEED = 100_000  # held-out clips never start from the noise of a calibration clip, nor are their probes those of calibration


class Texts(NamedTuple):
    """The conditions of calibration: those that people wrote, and probes, which are sampled after them."""

    written: list[str | Condition]
    probes: list[str | Condition]


def divided(
    pipe: Any, prompts: Prompts, wanted: Calibrate, held_out: int, call: Mapping[str, Any] | None = None
) -> tuple[Texts, list[str | Condition]]:
    """Conditions of calibration, and held-out ones of two kinds.

    Calibration takes the first prompts and some probes (:mod:`reelquant.models.probes`). The check must not be of the same texts: half of
    it are prompts that did not calibrate, the other half probes of other words. If no prompts are left, calibrated ones stand in, from
    other noise. A probe takes over the picture, the frames and so on of a condition that was given.

    Args:
        pipe: the pipeline; where its clips are made from no text, texts are empty and only their number counts.
        prompts: texts and conditions that were given; empty if there are none, and then nothing is made up for them.
        wanted: how much calibration the recipe wants.
        held_out: how many conditions choices and the check are made on.
        call: arguments of the pipeline call.
    """
    if not prompts:
        return Texts([], []), []
    check_texts(type(pipe), texts_of(prompts))
    prompts = fitted(type(pipe), prompts)
    conditions = any(isinstance(one, Condition) for one in prompts)
    if not reads_texts(type(pipe), call or {}, prompts):  # clips differ in their noise and conditions; there is nothing to probe with
        return _wordless(prompts if conditions else [], wanted.prompts, held_out)
    texts, rest = list(prompts[: wanted.prompts]), list(prompts[wanted.prompts :]) or list(prompts)
    probes = wanted.probe_count
    written = rest[: held_out - held_out // 2 if probes else held_out]
    return (
        Texts(texts, _probes(pipe, probes, wanted.seed, texts)),
        written + _probes(pipe, held_out - len(written) if probes else 0, wanted.seed + HELD_OUT_SEED, rest),
    )


def _wordless(prompts: Prompts, count: int, held_out: int) -> tuple[Texts, list[str | Condition]]:
    """Conditions without texts: those that were given, as far as they go; without any, clips that differ in their noise alone."""
    if not prompts:
        return Texts([*no_texts(count)], []), [*no_texts(held_out)]
    rest = list(prompts[count:]) or list(prompts)
    return Texts(list(prompts[:count]), []), rest[:held_out]


def _probes(pipe: Any, count: int, seed: int, prompts: Prompts) -> list[str | Condition]:
    """Texts of random words, with what the conditions give beside their texts."""
    made = probe_texts(pipe, count, seed, texts_of(prompts))
    return [replace(one, text=text) if (one := as_condition(prompts[i % len(prompts)])).inputs else text for i, text in enumerate(made)]
