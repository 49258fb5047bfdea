"""Better codes for parts of a denoiser, found on recorded calls. One file per algorithm; recipes name the members."""

from __future__ import annotations

import functools

from reelquant.reconstruct.adaround import AdaRound
from reelquant.stages import Stage, register

RECONSTRUCTIONS: dict[str, type[Stage]] = {"adaround": AdaRound}
register_reconstruction = functools.partial(register, RECONSTRUCTIONS, "reconstruction")

__all__ = ["RECONSTRUCTIONS", "AdaRound", "register_reconstruction"]
