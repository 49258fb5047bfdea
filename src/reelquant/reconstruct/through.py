"""Rounding that gradients pass through as if it were not there (the straight-through estimator)."""

from __future__ import annotations

from torch import Tensor

from reelquant.formats import Quantizer


def rounded(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Quantize and dequantize, with a gradient for the scales and, inside of the range, for ``x``.

    With ``x / s`` inside of the range the gradient of the scale is ``round(x / s) - x / s``, outside it is the number at the end of
    the range: that of LSQ (arXiv 1902.08153). Values are those of the quantizer up to the rounding of float32.
    """
    grain, fmt = quantizer.granularity, quantizer.format
    blocks, scale = grain.blocks(x.float()), quantizer.scale[:, None]
    zero = 0 if quantizer.zero_point is None else quantizer.zero_point[:, None]
    inside = (blocks / scale + zero).clamp(fmt.low, fmt.high)
    number = inside + (fmt.round(inside.detach()) - inside.detach())
    return grain.unblock((number - zero) * scale, x.shape)


def clipped(quantizer: Quantizer, x: Tensor) -> Tensor:
    """The same, but only clipped values move the scales: the gradient of a learned end of the range (PACT, PAMS).

    It does not see that a wider range has coarser steps, so at few bits ranges become too wide.
    """
    grain, fmt = quantizer.granularity, quantizer.format
    blocks, scale = grain.blocks(x.float()), quantizer.scale[:, None]
    zero = 0 if quantizer.zero_point is None else quantizer.zero_point[:, None]
    unit = (blocks / scale + zero).detach()
    ends = (unit.clamp(fmt.low, fmt.high) - zero) * scale
    values = blocks.where((unit >= fmt.low) & (unit <= fmt.high), ends)
    exact = (fmt.round(unit) - zero) * scale.detach()
    return grain.unblock(values + (exact - values).detach(), x.shape)


GRADIENTS = {"step": rounded, "range": clipped}
"""What moves a learned scale: the rounding of every value, or clipped values alone."""
