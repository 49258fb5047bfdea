"""Quantizing from disk to disk: stores, journals and files. The arithmetic is the engine's and does not belong here."""

from reelquant.streaming.estimate import Estimate, free_memory, parse_bytes
from reelquant.streaming.job import Job
from reelquant.streaming.run import quantize_folder
from reelquant.streaming.shared import sharing
from reelquant.streaming.source import Source

__all__ = ["Estimate", "Job", "Source", "free_memory", "parse_bytes", "quantize_folder", "sharing"]
