"""The gate: limits, directions, sentences."""

from __future__ import annotations

import pytest

from reelquant import RecipeError
from reelquant.evidence.gate import GATES, decide, parse_limits
from reelquant.evidence.metrics import GROUPS, METRICS, select

GOOD = {
    "psnr": 60.0, "ssim": 1.0, "lpips_alex": 0.0, "latent_error": 0.0, "color_shift": 0.0, "sharpness_deviation": 0.0,
    "motion_deviation": 0.0, "tempo": 1.0, "dropped": 0.0, "flicker_deviation": 0.0, "grain_deviation": 0.0,
    "checkerboard_deviation": 0.0, "length_deviation": 0.0, "black_frames": 0.0, "constant_frames": 0.0, "saturated_frames": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("preset", GATES)
def test_equal_clips_pass_every_preset(preset: str) -> None:
    verdict = decide(GOOD, {}, [], 4, preset)
    assert verdict.passed
    assert verdict.skipped == ()


def test_every_limit_of_a_preset_is_a_known_metric_and_strict_is_the_strictest() -> None:
    assert all(limit.metric in METRICS for preset in GATES.values() for limit in preset.limits)
    for strict, default, loose in zip(*(GATES[name].limits for name in ("strict", "default", "loose")), strict=True):
        assert (strict.low or 0) >= (default.low or 0) >= (loose.low or 0)
        assert (strict.high or 0) <= (default.high or 0) <= (loose.high or 0)


def test_a_failure_says_what_and_by_how_much() -> None:
    verdict = decide(GOOD | {"psnr": 20.5, "motion_deviation": -0.48}, {}, [], 4, "default")
    assert not verdict.passed
    assert [failure.sentence for failure in verdict.failures] == [
        "PSNR is 20.5 dB and misses the limit (at least 25) by 4.5",
        "Motion deviation is -0.480 and misses the limit (from -0.1 to 0.1) by 0.380",
    ]


def test_every_limit_is_a_check_with_its_margin() -> None:
    found = {name: value for name, value in GOOD.items() if name != "ssim"} | {"psnr": 20.5, "tempo": 1.02}
    checks = {check.metric: check for check in decide(found, {}, [], 4, "default", parse_limits(["psnr=20", "fvd=5"])).checks}
    assert (checks["psnr"].limit, checks["psnr"].margin, checks["psnr"].passed) == ("at least 20", 0.5, True)  # the last one of two
    assert checks["tempo"].margin == pytest.approx(0.08) and checks["tempo"].passed
    assert (checks["ssim"].value, checks["ssim"].passed) == (None, None)  # of a preset: left out
    assert (checks["fvd"].value, checks["fvd"].passed) == (None, False)  # asked for by name: missed
    assert (checks["defects"].value, checks["defects"].margin) == (0.0, 0.02)


def test_one_clip_with_a_defect_fails_four_and_not_a_hundred() -> None:
    defects = [{"name": "slowed", "clips": ["0003"], "sentence": "slowed motion: plays at 0.51 of the reference's speed"}]
    few = decide(GOOD, {}, defects, 4, "default")
    assert not few.passed
    assert "slowed in 1 of 4 clips (0003)" in few.failures[0].sentence
    assert decide(GOOD, {}, defects, 100, "default").passed
    assert not decide(GOOD, {}, defects, 100, "strict").passed


def test_what_a_preset_cannot_check_is_listed_and_what_was_asked_for_by_name_fails() -> None:
    rest = {name: value for name, value in GOOD.items() if name != "lpips_alex"}
    missing = {"lpips_alex": "needs weights", "fvd": "needs weights: reelquant weights i3d"}
    verdict = decide(rest, missing, [], 4, "default", parse_limits(["fvd=100"]))
    assert verdict.skipped == ("lpips_alex",)
    assert [failure.sentence for failure in verdict.failures] == ["FVD was not measured: needs weights: reelquant weights i3d"]


@pytest.mark.parametrize(
    ("text", "value", "passes"),
    [
        ("psnr=30", 30.0, True), ("psnr=30", 29.9, False), ("fvd=50", 50.0, True), ("fvd=50", 51.0, False),
        ("motion_deviation=0.1", -0.09, True), ("motion-deviation=0.1", 0.11, False), ("tempo=0.2", 0.85, True), ("tempo=0.2", 0.75, False),
    ],
)  # fmt: skip
def test_fail_under_follows_the_direction_of_the_metric(text: str, value: float, passes: bool) -> None:
    (limit,) = parse_limits([text])
    assert decide({limit.metric: value}, {}, [], 4, None, [limit]).passed == passes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("psnrr=30", "did you mean 'psnr'"),
        ("psnr", "is not a number"),
        ("psnr=high", "'high' is not a number"),
        ("motion_energy=1", "neither"),
    ],
)
def test_limits_that_make_no_sense_are_refused(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse_limits([text])


def test_metrics_are_chosen_by_name_and_group_in_the_order_of_the_table() -> None:
    assert select(["fvd,psnr", "ssim"]) == ["psnr", "ssim", "fvd"]
    assert select(["lpips"]) == ["lpips_alex", "lpips_vgg"]
    assert select(["all"]) == list(METRICS)
    assert set(GROUPS["quick"]) < set(METRICS)
    with pytest.raises(RecipeError, match="did you mean 'fvd'"):
        select(["fvdd"])
    with pytest.raises(RecipeError, match="no metric"):
        select([","])
