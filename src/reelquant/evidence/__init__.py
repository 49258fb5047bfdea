"""Evidence: how close quantized clips are to float ones, and files in which a person can see it.

``fidelity`` (PSNR, intervals over clips), ``media`` (MP4, GIF, PNG, contact sheets). Nothing here knows how a pipeline was quantized.
"""

from reelquant.evidence.fidelity import Interval, bootstrap, psnr
from reelquant.evidence.media import contact_sheet, read_video, side_by_side, write_video

__all__ = ["Interval", "bootstrap", "contact_sheet", "psnr", "read_video", "side_by_side", "write_video"]
