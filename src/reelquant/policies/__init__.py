"""What holds for a whole denoiser while it runs: protected steps, guidance halves, attention. Layers' numbers do not belong here."""

from __future__ import annotations

import functools

from reelquant.policies.attention import RoundAttention
from reelquant.policies.guidance import SeparateGuidance
from reelquant.policies.protect_steps import ProtectSteps, StepError
from reelquant.policies.scale_logits import ScaleLogits
from reelquant.stages import Stage, register

POLICIES: dict[str, type[Stage]] = {
    "protect_steps": ProtectSteps,
    "guidance": SeparateGuidance,
    "attention": RoundAttention,
    "scale_logits": ScaleLogits,
}
register_policy = functools.partial(register, POLICIES, "policy")

__all__ = ["POLICIES", "ProtectSteps", "RoundAttention", "ScaleLogits", "SeparateGuidance", "StepError", "register_policy"]
