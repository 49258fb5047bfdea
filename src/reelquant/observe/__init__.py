"""Statistics of layer inputs, gathered in one sampling pass of the real pipeline. What is done with them belongs elsewhere."""

from reelquant.observe.call import Call
from reelquant.observe.channel_range import ChannelRange
from reelquant.observe.collect import Steps, exchanged, observe, observe_methods, time_of
from reelquant.observe.features import Features
from reelquant.observe.frame_energy import Arrangement, FrameEnergy
from reelquant.observe.geometry import Geometry
from reelquant.observe.gram import Gram
from reelquant.observe.half_ranges import HalfRange, HalfRanges
from reelquant.observe.input_statistics import InputStatistics
from reelquant.observe.inverse_factor import inverse_factor
from reelquant.observe.recording import BUDGET, RecordedCall, Recording
from reelquant.observe.rotated_range import RotatedRange
from reelquant.observe.rows import Rows
from reelquant.observe.statistic import Statistic, Watched
from reelquant.observe.table import STATISTICS, register_statistic

__all__ = [
    "BUDGET",
    "STATISTICS",
    "Arrangement",
    "Call",
    "ChannelRange",
    "Features",
    "FrameEnergy",
    "Geometry",
    "Gram",
    "HalfRange",
    "HalfRanges",
    "InputStatistics",
    "RecordedCall",
    "Recording",
    "RotatedRange",
    "Rows",
    "Statistic",
    "Steps",
    "Watched",
    "exchanged",
    "inverse_factor",
    "observe",
    "observe_methods",
    "register_statistic",
    "time_of",
]
