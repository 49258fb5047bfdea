"""Figures over time, each on clips whose figure can be worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reelquant._errors import MeasurementError
from reelquant.evidence import temporal
from reelquant.evidence.temporal import LEVEL


def flat(*values: float, side: int = 16) -> Tensor:
    """Frames of one grey each."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, side, side).clone()


def sliding(frames: int, speed: float = 2.0, side: int = 48) -> Tensor:
    """A soft bright ball that moves to the right before mid grey, at some pixels a frame."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    center = 8 + speed * torch.arange(frames)[:, None, None]
    ball = 0.4 * torch.exp(-((columns - center) ** 2 + (rows - side / 2) ** 2) / 18)
    return (0.5 + ball)[:, None].expand(-1, 3, -1, -1).clone()


def noisy(clip: Tensor, levels: float) -> Tensor:
    return clip + levels * LEVEL * torch.randn(clip.shape)


# --- motion ---------------------------------------------------------------------------------------------------------------


def test_motion_energy_is_the_mean_squared_change():
    clip = flat(0.5, 0.6, 0.6)
    clip[2, :, :, :8] = 0.8  # half the frame by 0.2
    assert temporal.motion_energy(clip).tolist() == pytest.approx([0.01, 0.02], rel=1e-5)


def test_noise_adds_an_eighth_of_its_variance_to_the_motion_energy():
    clip = noisy(flat(*[0.5] * 9, side=64), 4)
    assert float(temporal.motion_energy(clip).mean()) == pytest.approx(2 * (4 * LEVEL) ** 2 / 16, rel=0.05)


def test_motion_deviation_is_relative_to_the_reference():
    reference, test = flat(0.2, 0.4, 0.2), flat(0.2, 0.6, 0.2)  # energies 0.04 and 0.16
    floor = LEVEL**2
    assert temporal.motion_deviation(reference, test) == pytest.approx(0.12 / (0.04 + floor), rel=1e-4)
    assert temporal.motion_deviation(reference, flat(0.2, 0.2, 0.2)) == pytest.approx(-0.04 / (0.04 + floor), rel=1e-4)


def test_a_still_reference_has_a_finite_motion_deviation():
    still = flat(0.5, 0.5)
    assert temporal.motion_deviation(still, still) == 0
    assert temporal.motion_deviation(still, flat(0.5, 0.5 + 3 * LEVEL)) == pytest.approx(9, rel=1e-4)
    assert temporal.motion_deviation(still[:1], still[:1]) == 0


def test_frozen_transitions_change_no_block_by_more_than_a_level():
    clip = flat(0.5, 0.5, 0.5, 0.5)
    clip[1:, :, :8, :8] += 1.5 * LEVEL  # one block of four
    clip[2:, :, :8, :8] += 0.5 * LEVEL
    assert temporal.frozen(clip).tolist() == [False, True, True]
    assert temporal.frozen(noisy(flat(*[0.5] * 5, side=64), 1)).all()


def test_dropped_counts_transitions_that_only_the_test_lacks():
    reference = flat(0.1, 0.2, 0.3, 0.3, 0.4)
    test = flat(0.1, 0.1, 0.3, 0.3, 0.4)
    assert temporal.dropped(reference, test) == 0.25
    assert temporal.dropped(reference, reference) == temporal.dropped(test, reference) == 0


def test_a_slow_change_that_coding_swallows_is_not_dropped():
    assert temporal.dropped(flat(0.5, 0.5 + 2.5 * LEVEL), flat(0.5, 0.5)) == 0  # below three levels
    assert temporal.dropped(flat(0.5, 0.5 + 3.5 * LEVEL), flat(0.5, 0.5 + 0.95 * LEVEL)) == 0  # keeps more than a quarter
    assert temporal.dropped(flat(0.5, 0.5 + 3.5 * LEVEL), flat(0.5, 0.5 + 0.8 * LEVEL)) == 1


# --- tempo ----------------------------------------------------------------------------------------------------------------

TEMPI = {
    "itself": (lambda clip: clip, 1.0),
    "repeated frames": (lambda clip: clip[torch.arange(len(clip)) // 2], 0.5),
    "frames between": (lambda clip: sliding(len(clip), speed=1.0), 0.5),
    "a third": (lambda clip: sliding(len(clip), speed=2 / 3), 1 / 3),
    "frozen": (lambda clip: clip[:1].expand_as(clip), 0.0),
    "reversed": (lambda clip: clip.flip(0), -1.0),
    "noise": (lambda clip: noisy(clip, 4), 1.0),
    "darker": (lambda clip: clip * 0.95, 1.0),
}


@pytest.mark.parametrize("case", TEMPI)
def test_tempo_of_a_moving_ball(case: str):
    change, expected = TEMPI[case]
    speed, confidence = temporal.tempo(sliding(13), change(sliding(13)))
    assert speed == pytest.approx(expected, abs=0.03)
    assert confidence > 0.8


def test_tempo_says_nothing_of_still_and_unrelated_clips():
    still = sliding(13, speed=0)
    assert temporal.tempo(still, still) == (1.0, 0.0)
    assert temporal.tempo(sliding(13), torch.rand(13, 3, 48, 48))[1] < 0.1
    assert temporal.tempo(sliding(2), sliding(2)) == (1.0, 0.0)


def test_a_bouncing_ball_is_frozen_and_not_matched_to_its_later_passes():
    up_and_down = sliding(7)[[0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0]]
    assert temporal.tempo(up_and_down, up_and_down)[0] == pytest.approx(1)
    assert temporal.tempo(up_and_down, up_and_down[:1].expand_as(up_and_down))[0] == pytest.approx(0)


# --- flicker and consistency ----------------------------------------------------------------------------------------------


def test_flicker_of_alternating_brightness_is_its_step():
    assert temporal.flicker(flat(0.5, 0.6, 0.5, 0.6, 0.5)) == pytest.approx(25.5, rel=1e-4)
    assert temporal.brightness_flicker(flat(0.5, 0.6, 0.5, 0.6, 0.5)) == pytest.approx(25.5, rel=1e-4)


def test_flicker_of_one_black_frame():
    clip = flat(*[0.5] * 3, 0, *[0.5] * 3)  # one of five inner frames sticks out by 0.5
    assert temporal.flicker(clip) == pytest.approx(0.5 / 5**0.5 * 255, rel=1e-4)


def test_fades_steps_and_edges_that_pass_do_not_flicker():
    assert temporal.flicker(flat(0, 0.1, 0.4, 0.5, 1)) == temporal.flicker(flat(0, 0, 1, 1)) == 0
    wipe = (torch.arange(16) < 2 * torch.arange(9)[:, None]).float()[:, None, None].expand(-1, 3, 16, -1)
    assert temporal.flicker(wipe) == temporal.brightness_flicker(wipe) == 0


def test_noise_flickers_but_not_in_brightness():
    clip = noisy(flat(*[0.5] * 9, side=64), 5)
    # Of three normal values x each is the largest, the middle and the smallest a third of the time, and the middle leaves 0:
    # E (x - median)^2 = 2/3 E (x3 - x2)^2 = 2/3 (2 - 3 sqrt(3) / (2 pi)) sigma^2.
    assert temporal.flicker(clip) == pytest.approx(5 * (2 / 3 * (2 - 3 * 3**0.5 / (2 * torch.pi))) ** 0.5, rel=0.02)
    assert temporal.brightness_flicker(clip) < 0.1


def test_two_frames_cannot_flicker():
    assert temporal.flicker(flat(0, 1)) == temporal.brightness_flicker(flat(0, 1)) == 0
    assert temporal.flicker_deviation(flat(0, 1), flat(1, 0)) == 0


def bouncing(frames: int = 9, contrast: float = 1.0) -> Tensor:
    """A bar that is at one of two places in turn, before a still background: its two places spike in every frame."""
    clip = flat(*[0.2] * frames, side=32)
    clip[::2, :, 10:18, 2:10] = clip[1::2, :, 10:18, 20:28] = 0.2 + 0.7 * contrast
    return clip


def test_flicker_over_a_still_reference_is_the_flicker_of_the_test():
    still, test = flat(0.5, 0.5, 0.5, 0.5), flat(0.5, 0.6, 0.5, 0.6)
    assert temporal.flicker_deviation(still, test) == pytest.approx(temporal.flicker(test), rel=1e-6)
    assert temporal.flicker_deviation(test, still) == pytest.approx(-temporal.flicker(test), rel=1e-6)
    assert temporal.flicker_deviation(test, test) == 0


def test_one_percent_of_contrast_does_not_flicker_in_a_clip_that_bounces():
    reference, test = bouncing(), bouncing(contrast=1.01)
    before, after = temporal.flicker(reference), temporal.flicker(test)
    assert before > 50 and (after**2 - before**2) ** 0.5 > 8
    assert temporal.flicker_deviation(reference, test) == pytest.approx(0.01 * before, rel=0.01)


def test_noise_beside_a_small_object_that_bounces_flickers_as_over_a_still_clip():
    torch.manual_seed(0)
    still = flat(*[0.2] * 9, side=96)
    reference = still.clone()
    reference[:, :, :32, :32] = bouncing()
    noise = noisy(still, 6) - still
    assert temporal.flicker_deviation(reference, reference + noise) == pytest.approx(temporal.flicker(still + noise), rel=0.05)


def test_frame_consistency_is_one_for_equal_frames_and_the_luminance_term_for_flat_ones():
    a, b, c = 0.4, 0.6, 0.01**2
    found = temporal.frame_consistency(flat(a, a, b)).tolist()
    assert found == pytest.approx([1, (2 * a * b + c) / (a * a + b * b + c)], rel=1e-6)
    assert float(temporal.frame_consistency(torch.rand(2, 3, 32, 32))) < 0.1
    assert len(temporal.frame_consistency(flat(0.5))) == 0


# --- single frames --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1.0, 4.0, 12.0])
def test_grain_is_the_sigma_of_added_noise_on_flats_ramps_and_beside_edges(sigma: float):
    ramp = torch.linspace(0.3, 0.6, 64).expand(2, 3, 64, 64).clone()
    ramp[..., 40:] += 0.2
    assert temporal.grain(noisy(ramp, sigma)) == pytest.approx(sigma, rel=0.06)
    assert temporal.grain(ramp) == pytest.approx(0, abs=1e-3)


def test_checkerboard_is_the_boards_amplitude_and_noise_an_eighth_of_its_sigma():
    rows, columns = torch.arange(32)[:, None], torch.arange(32)
    board = 1.0 - 2.0 * ((rows + columns) % 2)
    clip = flat(0.5, 0.5, side=32) + torch.tensor([5.0, -5.0])[:, None, None, None] * LEVEL * board
    assert temporal.checkerboard(clip) == pytest.approx(5, rel=1e-5)
    assert temporal.checkerboard(noisy(flat(*[0.5] * 9, side=64), 8)) == pytest.approx(1, rel=0.1)
    assert temporal.checkerboard(flat(0.5)) == pytest.approx(0, abs=1e-6)


def test_blockiness_is_the_step_at_grid_lines_against_the_others():
    columns = torch.arange(32)
    tiles = (0.5 + 8 * LEVEL * (columns // 8 % 2)).expand(1, 3, 32, 32)
    # three vertical lines of eight levels, three horizontal ones of none: on average 4, plus the quarter; elsewhere the quarter
    assert temporal.blockiness(tiles) == pytest.approx(4.25 / 0.25 - 1, rel=1e-4)
    assert temporal.blockiness(flat(0.5)) == 0
    assert temporal.blockiness(flat(0.5, side=6)) == 0  # no line in sight


def test_sharpness_is_the_rms_step():
    stripes = (0.5 + 10 * LEVEL * (torch.arange(17) % 2)).expand(1, 3, 17, 17)
    assert temporal.sharpness(stripes) == pytest.approx(10, rel=1e-5)


# --- colour ---------------------------------------------------------------------------------------------------------------

PUBLISHED = {  # sRGB primaries under D65, as colour science tables print them
    (1.0, 1.0, 1.0): (100.0, 0.0, 0.0),
    (0.0, 0.0, 0.0): (0.0, 0.0, 0.0),
    (1.0, 0.0, 0.0): (53.24, 80.09, 67.20),
    (0.0, 1.0, 0.0): (87.74, -86.18, 83.18),
    (0.0, 0.0, 1.0): (32.30, 79.19, -107.86),
}


@pytest.mark.parametrize("rgb", PUBLISHED)
def test_lab_of_the_primaries(rgb: tuple[float, float, float]):
    found = temporal.lab(torch.tensor(rgb, dtype=torch.float64)[None, :, None, None]).flatten().tolist()
    assert found == pytest.approx(PUBLISHED[rgb], abs=0.02)


def test_color_shift_is_a_distance_in_lab_and_one_black_frame_does_not_count():
    white, reference = flat(*[1.0] * 5), flat(*[0.5] * 5)
    assert temporal.color_shift(white, flat(*[0.0] * 5)) == pytest.approx(100, abs=1e-3)
    assert temporal.color_shift(reference, flat(0.5, 0.5, 0, 0.5, 0.5)) == pytest.approx(0, abs=1e-9)


# --- broken frames --------------------------------------------------------------------------------------------------------


def test_a_small_object_before_black_is_not_black():
    clip = flat(0.03, 0.03, side=64)  # the bundled black background
    assert temporal.black(clip) == temporal.constant(clip) == 2
    clip[0, 0, 10:13, 10:13] = 0.9  # nine red pixels of 4096
    assert temporal.black(clip) == temporal.constant(clip) == 1


def test_noise_in_a_black_frame_leaves_it_black():
    assert temporal.black(noisy(flat(*[0.0] * 3, side=64), 3)) == 3


def test_saturated_frames_have_nothing_but_zeros_and_ones():
    clip = torch.randint(2, (3, 3, 32, 32)).float()
    assert temporal.saturated(clip) == 3
    clip[1] = 0.5
    clip[2] = 0  # black, which has its own name
    assert temporal.saturated(clip) == 1


def test_newly_broken_counts_only_what_the_reference_has_not():
    reference, test = torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)
    reference[0] = test[0] = test[1] = 0
    test[2] = 0.4
    assert temporal.newly_broken(reference, test) == {"black": 1, "constant": 2, "saturated": 0}


@pytest.mark.parametrize("figure", [temporal.motion_deviation, temporal.dropped, temporal.tempo, temporal.color_shift])
def test_clips_of_different_shapes_are_refused(figure):
    with pytest.raises(MeasurementError, match="different shapes"):
        figure(torch.rand(3, 3, 16, 16), torch.rand(4, 3, 16, 16))
    with pytest.raises(MeasurementError, match=r"\[frames, 3, height, width\], not \[3, 16, 16\]"):
        figure(torch.rand(3, 16, 16), torch.rand(3, 16, 16))
