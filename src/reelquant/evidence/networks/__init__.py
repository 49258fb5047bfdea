"""Networks that metrics apply to videos: I3D (FVD), InceptionV3 (FID, KID), LPIPS, RAFT (optical flow). The metrics themselves do not
belong here.

All are our own inference-only code on published weights, compared with independent code in ``docs/metrics.md``.
``published`` is the table of weights, ``weights`` finds and checks them, ``download`` gets them (only when asked to),
``readers`` opens their files.
"""

from reelquant.evidence.networks.i3d import I3D
from reelquant.evidence.networks.inception import Inception
from reelquant.evidence.networks.lpips import LPIPS
from reelquant.evidence.networks.raft import RAFT

__all__ = ["I3D", "LPIPS", "RAFT", "Inception"]
