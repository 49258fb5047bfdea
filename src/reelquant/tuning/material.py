"""Texts and noise of the clips that tuning makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reelquant._errors import CalibrationError
from reelquant.models.condition import Prompts
from reelquant.models.pipelines import calibration_prompts
from reelquant.models.prompts import bundled_prompts
from reelquant.models.sampling import notes
from reelquant.models.shapes import evaluation_prompts, understood
from reelquant.tuning.recording import Clips

FURTHER = 3  # times as many clips of which only results are recorded
SAMPLED = 2  # times as many clips as are recorded, that each schedule of the search is sampled on
SEED, SAMPLED_SEED, HELD_OUT_SEED = 1_000, 2_000, 50_000


@dataclass(frozen=True)
class Material:
    """The clips of each part of a run.

    Attributes:
        recorded: with everything computed, then once more for every step.
        further: with everything computed, as many at a time.
        sampled: of the schedules that say which damages to plan with.
        judged: of the trials.
    """

    recorded: Clips
    further: list[Clips]
    sampled: Clips
    judged: Clips


def material(pipe: Any, prompts: Prompts | None, held_out: Prompts | None, recorded: int, judged: int, call: Mapping[str, Any]) -> Material:
    """Choose texts, those of trials from such as nothing is recorded on.

    Args:
        pipe: the pipeline, which may name its own texts.
        prompts: texts to record; None for the pipeline's own or general ones.
        held_out: texts of trials; None for evaluation captions or general ones.
        recorded, judged: numbers of clips.
        call: arguments of the pipeline call.

    Raises:
        CalibrationError: without any text.
    """
    most = recorded * max(1 + FURTHER, SAMPLED)
    given = list(calibration_prompts(pipe, most) if prompts is None else prompts)[:most]
    others = _others(pipe, held_out, judged, given)
    if not given or not others:
        raise CalibrationError("tune needs texts: give at least one to record, and one to try")
    texts = given[:recorded]
    firsts = range(len(texts), len(texts) * (1 + FURTHER), len(texts))
    further = [_in_turn(given, range(first, first + len(texts)), SEED, call) for first in firsts]
    return Material(
        recorded=_in_turn(texts, range(len(texts)), SEED, call),
        further=further,
        sampled=_in_turn(given, range(SAMPLED * len(texts)), SAMPLED_SEED, call),
        judged=_in_turn(others, range(judged), HELD_OUT_SEED, call),
    )


def _in_turn(texts: Sequence[Any], numbers: range, seed: int, call: Mapping[str, Any]) -> Clips:
    """The clips of these numbers: texts from the beginning again where they end, noise of its own for each."""
    chosen = [texts[number % len(texts)] for number in numbers]
    return Clips(chosen, range(seed + numbers.start, seed + numbers.stop), call)


def _others(pipe: Any, given: Prompts | None, clips: int, recorded: Sequence[Any]) -> list[Any]:
    """Texts that nothing was recorded on, if there are any."""
    if given is None:
        given = evaluation_prompts(clips) if understood(notes(pipe).get("prompts", ())) else bundled_prompts()
    return [one for one in given if one not in recorded] or list(given)
