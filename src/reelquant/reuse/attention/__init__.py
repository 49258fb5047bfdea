"""Attention that is not computed at every step, one file per mode. Blocks that are not computed do not belong here."""

from reelquant.reuse.attention.modes import MODES
from reelquant.reuse.attention.stage import AttentionReuse

__all__ = ["MODES", "AttentionReuse"]
