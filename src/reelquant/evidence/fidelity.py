"""How close clips are to reference clips that start from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reelquant._errors import MeasurementError

CEILING = 100.0  # dB; equal clips score this instead of infinity, so that means and JSON stay finite


@dataclass(frozen=True)
class Interval:
    """A mean over clips with its bootstrap interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} ({self.low:.1f} to {self.high:.1f})"


def psnr(reference: Tensor, test: Tensor) -> Tensor:
    """``10 log10(1 / mse)`` of every clip in dB, at most 100.

    Args:
        reference: ``[clips, frames, 3, height, width]`` in [0, 1] (peak 1).
        test: the same shape.

    Returns:
        ``[clips]``.

    Raises:
        MeasurementError: if the shapes differ.
    """
    if reference.shape != test.shape:
        raise MeasurementError(
            f"clips of different shapes cannot be compared: {tuple(reference.shape)} and {tuple(test.shape)}; cut or scale one of them"
        )
    error = (test.double() - reference.double()).square().flatten(1).mean(1)
    return (-10 * error.clamp(min=10 ** (-CEILING / 10)).log10()).float()


def ssim(reference: Tensor, test: Tensor) -> float:
    """Structural similarity of two clips, mean over pixels, channels and frames.

    Paper: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004, with its constants, a Gaussian
    window of 11 pixels (sigma 1.5) and mirrored borders, as torchmetrics has it. The window is applied to rows and then to columns, where
    torchmetrics multiplies all 121 weights.

    Args:
        reference: ``[frames, 3, height, width]`` in [0, 1], at least 11 pixels high and wide.
        test: the same shape.
    """
    from scipy.ndimage import gaussian_filter

    def smooth(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, sigma=(0, 0, 1.5, 1.5), truncate=3.5, mode="mirror")

    # in float64: the variances are differences of large sums, and equal flat frames would get 0.9999
    x, y = (clip.double().cpu().numpy() for clip in (reference, test))
    mean_x, mean_y = smooth(x), smooth(y)
    both = mean_x * mean_y
    squares = mean_x**2 + mean_y**2
    variances = np.clip(smooth(x * x) - mean_x**2, 0, None) + np.clip(smooth(y * y) - mean_y**2, 0, None)
    covariance = smooth(x * y) - both
    small, smaller = 0.01**2, 0.03**2
    return float((((2 * both + small) * (2 * covariance + smaller)) / ((squares + small) * (variances + smaller))).mean())


def bootstrap(values: Tensor | Sequence[float], level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean over clips and the percentile interval of means of clips drawn with replacement.

    Args:
        values: one figure per clip, at least one.
        level: coverage of the interval.
        resamples: how many times clips are drawn.
        seed: of the drawing; the same seed gives the same interval.

    Raises:
        MeasurementError: if there are no values.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    if not values.numel():
        raise MeasurementError("a mean over no clips: give at least one value")
    draws = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = values[draws].mean(1).quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high)
