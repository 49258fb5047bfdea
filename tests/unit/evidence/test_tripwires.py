"""What is stopped, with which words, and what passes."""

from __future__ import annotations

import pytest
import torch

from reelquant import CalibrationError
from reelquant.evidence.temporal import LEVEL
from reelquant.evidence.tripwires import check_frames, check_latents, find_in_frames, find_in_latents
from reelquant.models.shapes import OBJECTS, Scene, render


def broken_latents(kind: str) -> torch.Tensor:
    latents = torch.randn(1, 4, 3, 8, 8)
    table = {
        "nan": latents.masked_fill(torch.arange(8) == 3, torch.nan),
        "inf": latents.masked_fill(torch.arange(8) == 3, torch.inf),
        "constant": torch.full_like(latents, 0.25),
        "zero": torch.zeros_like(latents),
        "exploded": latents * 1000,
    }
    return table[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nan", "96 of 768 values are NaN or inf; run it in bfloat16"),
        ("inf", "96 of 768 values are NaN or inf"),
        ("constant", r"constant, all values near 0\.25 \(spread 0\)"),
        ("zero", "constant, all values near 0 "),
        ("exploded", r"exploded, RMS .*e\+03, above 50; quantize with more bits"),
    ],
)
def test_broken_latents_are_stopped_with_step_and_clip(kind: str, words: str):
    latents = broken_latents(kind)
    with pytest.raises(CalibrationError, match=rf"^latents of clip 'a dog' after step 0: .*{words}"):
        check_latents(latents if kind != "exploded" else latents.half().float(), 0, "a dog")


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_latents_of_any_usual_size_pass(scale: float):
    assert find_in_latents(scale * torch.randn(2, 4, 3, 8, 8) + 0.5, 7, "a") == []
    check_latents(scale * torch.randn(2, 4, 3, 8, 8).bfloat16(), 7, "a")


@pytest.mark.parametrize("background", ["black", "white", "gray", "checkered", "striped"])
def test_every_small_object_of_the_bundled_world_passes(background: str):
    for motion in ("shrinking", "left", "bouncing"):
        for name in OBJECTS:
            clip = render(Scene(name, "purple", motion, "small", background), torch.Generator().manual_seed(0), frames=5)
            assert find_in_frames(clip, name) == [], (name, motion)


def test_a_clip_of_rubbish_is_told_by_kind_and_frame():
    clip = torch.rand(12, 3, 16, 16) * 0.8 + 0.1
    clip[1] = clip[3] = 0
    clip[4] = 0.4
    clip[5:] = torch.randint(2, (7, 3, 16, 16)).float()
    black, constant, saturated = find_in_frames(clip, "a dog")
    assert black.startswith("frames 1, 3 of clip 'a dog': black, 99.9 % of the pixels are below 16 of 255; ")
    assert constant.startswith("frame 4 of clip 'a dog': constant, nothing but the colour (102, 102, 102) in the first of them; ")
    assert saturated.startswith("frames 5, 6, 7, 8, 9, 10, 11 of clip 'a dog': saturated, more than 80% of the pixels")
    with pytest.raises(CalibrationError, match="frames 1, 3 of clip 'a dog': black"):
        check_frames(clip, "a dog")


def test_many_frames_are_counted_and_not_listed():
    assert "frames 0, 1, 2, 3, 4, 5, 6, 7 ... (30 of 30)" in find_in_frames(torch.zeros(30, 3, 8, 8), "a")[0]


def test_nan_and_values_out_of_range_are_told():
    clip = torch.rand(3, 3, 8, 8)
    clip[2, 0, 0, 0] = torch.nan
    assert find_in_frames(clip, "a")[0].startswith("frame 2 of clip 'a': not finite, NaN or inf values")
    assert find_in_frames(torch.rand(3, 3, 8, 8) * 2 - 1, "a")[0].startswith("frames 0, 1, 2 of clip 'a': out of range, values from -")
    clip = torch.rand(3, 3, 8, 8) * (1 + LEVEL)  # rounding, not a fault
    assert find_in_frames(clip, "a") == []
