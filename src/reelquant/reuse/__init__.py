"""What is not computed. One file per mechanism."""

from reelquant.reuse.temporal_table import add_table, drop_unused

__all__ = ["add_table", "drop_unused"]
