"""Evidence: what quantization changed in the clips, beside what a second float run changes, and a report. Choices that a recipe makes
during quantization do not belong here.

``run`` evaluates and compares. It uses ``sampling`` (clips of each variant), ``measure`` (a row of figures per clip),
``evaluation`` (means, intervals, noise floor), ``gate`` (limits), ``judging`` (all of these, then the report) and
``report`` (the page); ``several`` does so for each of several tests. ``expected`` tells how long it will take, ``costs`` measures
bytes and speed. ``metrics`` is the table of figures, ``mechanisms`` computes them, ``media`` reads and writes
clips.
"""

from reelquant.evidence.fidelity import Interval, bootstrap, psnr
from reelquant.evidence.media import contact_sheet, side_by_side, write_video
from reelquant.evidence.reading import read_video

__all__ = ["Interval", "bootstrap", "contact_sheet", "psnr", "read_video", "side_by_side", "write_video"]
