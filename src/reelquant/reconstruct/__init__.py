"""Better codes for parts of a denoiser, found on recorded calls, one file per algorithm. What solves one weight alone is a solver, and
making calls again is the engine's work: neither belongs here."""

from __future__ import annotations

import functools

from reelquant.reconstruct.adaround import AdaRound
from reelquant.reconstruct.lsq import Lsq
from reelquant.reconstruct.scales import Scales
from reelquant.reconstruct.straight_through import StraightThrough
from reelquant.stages import Stage, register

RECONSTRUCTIONS: dict[str, type[Stage]] = {
    "adaround": AdaRound,
    "lsq": Lsq,
    "scales": Scales,
    "straight_through": StraightThrough,
}
register_reconstruction = functools.partial(register, RECONSTRUCTIONS, "reconstruction")

__all__ = ["RECONSTRUCTIONS", "AdaRound", "Lsq", "Scales", "StraightThrough", "register_reconstruction"]
