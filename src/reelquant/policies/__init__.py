"""What holds for a whole denoiser while it runs: bits of steps, guidance halves, attention, sizes. Layers' numbers do not belong here."""

from __future__ import annotations

import functools

from reelquant.policies.attention import RoundAttention
from reelquant.policies.guidance import SeparateGuidance
from reelquant.policies.protect_steps import ProtectSteps, StepError
from reelquant.policies.resolution import ChangeResolution, put_resolution, resolution_of
from reelquant.policies.scale_logits import ScaleLogits
from reelquant.policies.step_bits import StepBits
from reelquant.stages import Stage, register

POLICIES: dict[str, type[Stage]] = {
    "protect_steps": ProtectSteps,
    "step_bits": StepBits,
    "guidance": SeparateGuidance,
    "attention": RoundAttention,
    "resolution": ChangeResolution,
    "scale_logits": ScaleLogits,
}
register_policy = functools.partial(register, POLICIES, "policy")

__all__ = [
    "POLICIES",
    "ChangeResolution",
    "ProtectSteps",
    "RoundAttention",
    "ScaleLogits",
    "SeparateGuidance",
    "StepBits",
    "StepError",
    "put_resolution",
    "register_policy",
    "resolution_of",
]
