"""Every planted defect is named on real and rendered clips, and invisible changes are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant._errors import MeasurementError
from reelquant.evidence.defects import CALLED, OVER_TIME, PLANT, RULES, diagnose, figures
from reelquant.evidence.media import write_video
from reelquant.evidence.reading import read_video
from reelquant.models.shapes import Scene, random_clip, render

REAL = ("natural_174", "natural_209", "natural_239", "generated_030", "generated_100", "generated_090")
MADE = (900_001, 900_002, 900_004)


def small(clip: Tensor) -> Tensor:
    """At most 13 frames of at most 64 pixels."""
    scale = 64 / max(clip.shape[-2:])
    return F.interpolate(clip[:13], scale_factor=scale, mode="bilinear", antialias=True).clamp(0, 1)


def noise(decibel: float) -> Callable[[Tensor, Path], Tensor]:
    return lambda clip, folder: (clip + 10 ** (-decibel / 20) * torch.randn_like(clip)).clamp(0, 1)


def recompressed(clip: Tensor, folder: Path) -> Tensor:
    height, width = clip.shape[-2:]
    return read_video(write_video(clip, folder / "clip.mp4")[0])[:, :, :height, :width]  # odd sides are padded


HARMLESS: dict[str, Callable[[Tensor, Path], Tensor]] = {
    "nothing": lambda clip, folder: clip,
    "noise at 50 dB": noise(50),
    "noise at 40 dB": noise(40),
    "H.264 at crf 12": recompressed,
    "bfloat16": lambda clip, folder: clip.bfloat16().float(),
    "one percent of contrast": lambda clip, folder: (1.01 * clip).clamp(0, 1),
}


def named(clip: Tensor, folder: Path) -> dict[str, list[str]]:
    """The defects told of the clip after every change, harmful or not."""
    changed = {name: plant(clip) for name, plant in PLANT.items()} | {name: change(clip, folder) for name, change in HARMLESS.items()}
    for name, damaged in changed.items():
        assert damaged.shape == clip.shape and float(damaged.min()) >= 0 and float(damaged.max()) <= 1, name
    return {name: [defect.name for defect in diagnose(figures(clip, damaged))] for name, damaged in changed.items()}


RIGHT = {name: [CALLED.get(name, name)] for name in PLANT} | {name: [] for name in HARMLESS}


@pytest.mark.parametrize("name", REAL)
def test_planted_defects_are_named_on_real_clips(material: Path, tmp_path: Path, name: str):
    assert named(small(read_video(material / "clips" / f"{name}.mp4")), tmp_path) == RIGHT


@pytest.mark.parametrize("seed", MADE)
def test_planted_defects_are_named_on_rendered_clips(tmp_path: Path, seed: int):
    assert named(random_clip(seed)[0], tmp_path) == RIGHT


def ball(**change: str) -> Tensor:
    scene = {"shape": "circle", "color": "red", "motion": "right", "size": "large", "background": "gray"} | change
    return render(Scene(**scene), torch.Generator().manual_seed(1))


def test_a_sentence_gives_the_figure():
    (slowed,) = diagnose(figures(ball(), PLANT["slowed_blended"](ball())))
    assert slowed.name == "slowed" and slowed.sentence == "slowed motion: plays at 0.50 of the reference's speed"
    assert slowed.strength == pytest.approx(0.5 / 0.2, rel=0.02)
    (black,) = diagnose(figures(ball(), PLANT["black_frame"](ball())))
    assert black.sentence == "black frames: 1 that the reference does not have" and black.strength == 1


def test_two_defects_at_once_are_both_named():
    damaged = PLANT["noise"](PLANT["slowed_repeated"](ball()))
    assert [defect.name for defect in diagnose(figures(ball(), damaged))] == ["slowed", "noise"]
    damaged = PLANT["color_shift"](PLANT["dropped"](ball()))
    assert [defect.name for defect in diagnose(figures(ball(), damaged))] == ["dropped", "color_shift"]


def test_motion_that_fades_but_keeps_its_time_is_less_motion():
    reference = torch.stack([0.5 + 0.3 * torch.sin(torch.arange(64) / 5 + t / 4) for t in range(13)])[:, None, None].expand(-1, 3, 64, -1)
    faded = 0.5 + (reference - 0.5) * 0.5
    assert "less_motion" in [defect.name for defect in diagnose(figures(reference, faded))]


def test_burnt_and_one_coloured_frames_are_named():
    burnt, plain = ball(), ball()
    burnt[5] = torch.randint(2, burnt[5].shape).float()
    plain[5] = 0.5
    assert "saturated_frame" in [defect.name for defect in diagnose(figures(ball(), burnt))]
    assert [defect.name for defect in diagnose(figures(ball(), plain))] == ["constant_frame"]


def test_a_still_clip_cannot_be_slow():
    still = ball()[:1].expand(13, -1, -1, -1)
    for name in OVER_TIME:
        assert diagnose(figures(still, PLANT[name](still))) == []


def test_clips_of_two_frames_have_all_figures_and_of_one_none():
    found = figures(ball()[:2], ball()[:2])
    assert all(isinstance(value, float) for value in found.values()) and diagnose(found) == []
    with pytest.raises(MeasurementError, match="at least 2 frames"):
        figures(ball()[:1], ball()[:1])


def test_the_table_of_rules_is_closed():
    hidden = {name for rule in RULES.values() for name in rule.hides}
    assert hidden <= set(RULES) and {CALLED.get(name, name) for name in PLANT} <= set(RULES)
