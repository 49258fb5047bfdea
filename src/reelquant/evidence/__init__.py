"""Evidence: what quantization changed in the clips, beside what float changes by itself, and pages in which a person can see it.

``run`` (evaluate, compare) stands on ``sampling`` (clips of each variant), ``measure`` (a row per clip), ``evaluation``
(figures, floor, verdicts), ``gate`` and ``report``; ``metrics`` is the table of figures, ``mechanisms`` what gives
them, ``media`` files.
"""

from reelquant.evidence.fidelity import Interval, bootstrap, psnr
from reelquant.evidence.media import contact_sheet, read_video, side_by_side, write_video

__all__ = ["Interval", "bootstrap", "contact_sheet", "psnr", "read_video", "side_by_side", "write_video"]
