"""The warping error, with flows known by construction and with OpenCV's."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant import UnsupportedError
from reelquant._errors import MeasurementError
from reelquant.evidence.warping import dis_flow, visible, warp, warping_error


def shift(x: float, y: float):
    """A flow that says the same everywhere, forward or backward by the order in which it is asked."""
    signs = iter([1, -1] * 100)

    def flow(first: Tensor, second: Tensor) -> Tensor:
        return next(signs) * torch.tensor([x, y])[None, :, None, None].expand(len(first), 2, *first.shape[-2:])

    return flow


def texture(side: int = 96) -> Tensor:
    return F.interpolate(torch.rand(1, 3, side // 8, side // 8), (side, side), mode="bicubic").clamp(0, 1)


def panned(frames: int, x: int = 3, y: int = 2, side: int = 64) -> Tensor:
    """Content moves by +x and +y pixels a frame."""
    big = texture(160)
    return torch.cat([big[..., 40 - y * i : 40 - y * i + side, 40 - x * i : 40 - x * i + side] for i in range(frames)])


def test_warping_looks_up_where_the_flow_points():
    picture = torch.arange(12.0).reshape(1, 1, 3, 4)
    right = torch.tensor([1.0, 0.0])[None, :, None, None].expand(1, 2, 3, 4)
    assert torch.allclose(warp(picture, right)[0, 0], torch.tensor([[1.0, 2, 3, 3], [5, 6, 7, 7], [9, 10, 11, 11]]), atol=1e-5)
    assert torch.allclose(warp(picture, right / 2)[0, 0, 0], torch.tensor([0.5, 1.5, 2.5, 3]), atol=1e-5)


def test_a_pan_has_no_warping_error_once_its_motion_is_known():
    clip = panned(3)
    assert warping_error(clip, shift(3, 2)).tolist() == pytest.approx([0, 0], abs=1e-9)
    assert float(warping_error(clip, shift(0, 0))[0]) == pytest.approx(float((clip[0] - clip[1]).square().mean()), rel=1e-5)


def test_a_brighter_frame_costs_its_square():
    clip = panned(2) * 0.8
    clip[1] += 0.1
    assert warping_error(clip, shift(3, 2)).tolist() == pytest.approx([0.01], rel=1e-4)


def test_targets_outside_the_frame_do_not_count():
    flow = torch.tensor([3.0, -2.0])[None, :, None, None].expand(1, 2, 8, 10)
    seen = visible(flow, -flow)[0, 0]
    assert seen[2:, :7].all() and seen.sum() == 6 * 7


def test_pixels_whose_flow_does_not_lead_back_are_hidden():
    zero = torch.zeros(1, 2, 8, 8)
    away = zero.clone()
    away[:, 0] = 0.72  # 0.72^2 = 0.5184 against 0.5 + 0.01 * 0.5184 = 0.5052
    assert visible(zero, zero).all() and not visible(zero, away).any()
    assert visible(zero, away * 0.98).all()  # 0.4979 against 0.5050


def test_motion_boundaries_are_hidden():
    forward = torch.zeros(1, 2, 8, 8)
    forward[:, 1, :, 4:] = 0.2  # a step of 0.04 in the gradient's energy where 0.002 and no motion allow none
    hidden = ~visible(forward, -forward)[0, 0]
    assert hidden[:7, 3].all() and not hidden[:7, [0, 1, 2, 4, 5, 6]].any()


def test_where_nothing_is_visible_the_error_is_zero():
    assert warping_error(torch.rand(2, 3, 8, 8), shift(100, 0)).tolist() == [0]


def test_a_flow_of_another_shape_is_refused():
    with pytest.raises(MeasurementError, match=r"must be \(1, 2, 8, 8\), not \(1, 2, 4, 4\)"):
        warping_error(torch.rand(2, 3, 8, 8), lambda first, second: torch.zeros(1, 2, 4, 4))


def test_a_clip_of_one_frame_has_no_transition():
    assert warping_error(torch.rand(1, 3, 8, 8), shift(0, 0)).shape == (0,)


def test_the_classical_flow_finds_a_shift_and_flicker_raises_the_error():
    pytest.importorskip("cv2")
    clip = panned(4)
    flow = dis_flow(clip[:2], clip[1:3])
    inner = flow[:, :, 12:-12, 12:-12]
    assert inner.mean((0, 2, 3)).tolist() == pytest.approx([3, 2], abs=0.1)
    calm = float(warping_error(clip, dis_flow).mean())
    assert calm < 1e-4 < 1e-3 < float(warping_error((clip + 0.05 * torch.randn(4, 3, 64, 64)).clamp(0, 1), dis_flow).mean())


def test_the_classical_flow_takes_tiny_pictures():
    pytest.importorskip("cv2")
    assert dis_flow(torch.rand(2, 3, 9, 20), torch.rand(2, 3, 9, 20)).shape == (2, 2, 9, 20)


def test_an_absent_opencv_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UnsupportedError, match="pip install opencv-python-headless"):
        dis_flow(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))
