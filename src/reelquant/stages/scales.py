"""Scales of a weight that a stage found, as the layer can store them."""

from __future__ import annotations

from torch import Tensor

from reelquant.formats import Quantizer, read_scales, scale_tensors


def storable(quantizer: Quantizer, scale: Tensor) -> Tensor:
    """Scales ``[n]`` rounded to numbers that a weight with this quantizer may have, float32; they may round to zero or infinity."""
    grain = quantizer.granularity
    stored, _ = scale_tensors(grain.scale, scale, quantizer.whole, grain.scale_dtype)
    return read_scales(grain.scale, stored, quantizer.whole)
