"""How badly a clip's frames fit one another once their motion is taken out.

Clips are ``[frames, 3, height, width]`` in [0, 1]; flow is in pixels, channel 0 to the right and channel 1 down, and
says where each pixel of the first picture is found in the second one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant._errors import MeasurementError, UnsupportedError

Flow = Callable[[Tensor, Tensor], Tensor]
"""``flow(first, second)`` of pictures ``[n, 3, height, width]`` in [0, 1] gives ``[n, 2, height, width]`` in pixels."""

RELATIVE, ABSOLUTE = 0.01, 0.5  # Sundaram et al. 2010, equation 5; the second in square pixels
EDGE_RELATIVE, EDGE_ABSOLUTE = 0.01, 0.002  # equation 6, motion boundaries, as in Lai et al.'s code


def warp(picture: Tensor, flow: Tensor) -> Tensor:
    """The picture looked up, bilinearly, where the flow points; beyond the edge it is the edge.

    Args:
        picture: ``[n, channels, height, width]``.
        flow: ``[n, 2, height, width]`` in pixels.
    """
    height, width = picture.shape[-2:]
    where = _targets(flow) + 0.5  # centres of pixels lie at halves
    grid = torch.stack([where[:, 0] * 2 / width, where[:, 1] * 2 / height], -1) - 1
    return F.grid_sample(picture, grid, padding_mode="border", align_corners=False)


def visible(forward: Tensor, backward: Tensor) -> Tensor:
    """Which pixels of the first picture can be compared: bool ``[n, 1, height, width]``.

    A pixel counts if its flow stays inside the frame, if the backward flow at its target leads back,
    ``|f + b|^2 < 0.01 (|f|^2 + |b|^2) + 0.5``, and if it lies on no motion boundary, ``|grad u|^2 + |grad v|^2 <= 0.01
    |f|^2 + 0.002``.

    Args:
        forward: from the first picture to the second, ``[n, 2, height, width]`` in pixels.
        backward: from the second to the first.

    Paper:
        Sundaram et al. 2010, "Dense Point Trajectories by GPU-Accelerated Large Displacement Optical Flow", equations 5
        and 6. Ours adds that targets outside the frame are hidden, and the gradient is of forward differences.
    """
    height, width = forward.shape[-2:]
    back = warp(backward, forward)
    returns = _energy(forward + back) < RELATIVE * (_energy(forward) + _energy(back)) + ABSOLUTE
    smooth = _steepness(forward) <= EDGE_RELATIVE * _energy(forward) + EDGE_ABSOLUTE
    x, y = _targets(forward).unbind(1)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return returns & smooth & inside[:, None]


def warping_error(clip: Tensor, flow: Flow) -> Tensor:
    """Mean squared difference of each frame and the next one warped back onto it, over the pixels visible in both.

    ``E(t) = sum_p M(p) mean_c (V_t(p) - V_t+1(p + f(p)))^2 / sum_p M(p)`` with the mask ``M`` of :func:`visible`. The
    flow is that of the clip itself. A clip that stands still has error 0, so a low error means little without motion
    energy beside it.

    Args:
        clip: ``[frames, 3, height, width]`` in [0, 1].
        flow: any optical flow, such as :func:`dis_flow`; called once per direction and transition, so memory does not
            grow with frames.

    Returns:
        float64 ``[frames - 1]``, in squared units of [0, 1]; 0 where no pixel is visible, as at a cut.

    Paper:
        Lai et al. 2018, "Learning Blind Video Temporal Consistency", the warping error of its evaluation. The paper
        writes the squared norm over the three colours, which is three times our mean over them.
    """
    errors = [_pair_error(clip[i : i + 1].float(), clip[i + 1 : i + 2].float(), flow) for i in range(len(clip) - 1)]
    return torch.stack(errors) if errors else torch.zeros(0, dtype=torch.float64)


def _pair_error(first: Tensor, second: Tensor, flow: Flow) -> Tensor:
    forward, backward = flow(first, second).to(first), flow(second, first).to(first)
    expected = (len(first), 2, *first.shape[-2:])
    if forward.shape != expected:
        raise MeasurementError(f"the flow of pictures {tuple(first.shape)} must be {expected}, not {tuple(forward.shape)}")
    seen = visible(forward, backward)
    difference = (first - warp(second, forward)).double().square().mean(1, keepdim=True)
    return (difference * seen).sum() / seen.sum().clamp(min=1)


def _targets(flow: Tensor) -> Tensor:
    """Coordinates of every pixel plus its flow, ``[n, 2, height, width]``; the first pixel's centre is 0."""
    rows, columns = (torch.arange(side, dtype=flow.dtype, device=flow.device) for side in flow.shape[-2:])
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1]) + flow


def _energy(flow: Tensor) -> Tensor:
    return flow.square().sum(1, keepdim=True)


def _steepness(flow: Tensor) -> Tensor:
    right = F.pad(flow.diff(dim=-1), (0, 1))
    down = F.pad(flow.diff(dim=-2), (0, 0, 0, 1))
    return _energy(right) + _energy(down)


def dis_flow(first: Tensor, second: Tensor) -> Tensor:
    """Dense inverse search optical flow of OpenCV (its medium preset), on the luma; no weights needed.

    Args:
        first: ``[n, 3, height, width]`` in [0, 1]; sides below 32 pixels are padded by repeating the edge.
        second: the same shape.

    Returns:
        float32 ``[n, 2, height, width]`` in pixels, on the CPU.

    Raises:
        UnsupportedError: if OpenCV is not installed.

    Paper:
        Kroeger et al. 2016, "Fast Optical Flow using Dense Inverse Search".
    """
    try:
        import cv2
    except ImportError:
        raise UnsupportedError("this optical flow needs OpenCV, which is not installed: pip install opencv-python-headless") from None
    height, width = first.shape[-2:]
    pad = (0, max(0, 32 - width), 0, max(0, 32 - height))  # its coarsest scale wants a few 8x8 patches
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    pairs = zip(_gray(first, pad), _gray(second, pad), strict=True)
    found = [torch.from_numpy(search.calc(one, other, None)) for one, other in pairs]
    return torch.stack(found).permute(0, 3, 1, 2)[..., :height, :width].contiguous()


def _gray(pictures: Tensor, pad: tuple[int, int, int, int]) -> list:
    padded = F.pad(pictures.detach().float().cpu().clamp(0, 1), pad, mode="replicate")
    weights = torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None]
    return [frame.numpy() for frame in ((padded * weights).sum(1) * 255).round().byte()]
