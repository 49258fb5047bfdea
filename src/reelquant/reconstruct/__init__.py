"""Better codes for parts of a denoiser, found on recorded calls. One file per algorithm; the table is what recipes can name."""

from __future__ import annotations

import functools

from reelquant.stages import Stage, register

RECONSTRUCTIONS: dict[str, type[Stage]] = {}
register_reconstruction = functools.partial(register, RECONSTRUCTIONS, "reconstruction")

__all__ = ["RECONSTRUCTIONS", "register_reconstruction"]
