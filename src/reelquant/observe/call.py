"""Which call of the denoiser an input belongs to."""

from __future__ import annotations

from dataclasses import dataclass

from reelquant.clock import ANY


@dataclass(frozen=True)
class Call:
    """The denoiser call that an input belongs to.

    Attributes:
        step: index of its timestep, in the order in which timesteps were first seen.
        part: number of the sampler run. Runs come one after the other, so this never decreases.
        half: which half of a guidance pair the call computes, as :mod:`reelquant.clock` numbers them.
        probe: whether its texts are random words: they widen ranges, and count for nothing else.
        frames: of the latents; 1 if that is not known.
    """

    step: int
    part: int = 0
    half: int = ANY
    probe: bool = False
    frames: int = 1
