"""Seeing: statistics of layer inputs, gathered in one sampling pass of the real pipeline."""

from reelquant.observe.collect import Steps, observe
from reelquant.observe.statistics import ChannelRange, Features, Geometry, Gram, InputStatistics, Need, Rows, Statistic, inverse_factor

__all__ = [
    "ChannelRange",
    "Features",
    "Geometry",
    "Gram",
    "InputStatistics",
    "Need",
    "Rows",
    "Statistic",
    "Steps",
    "inverse_factor",
    "observe",
]
