"""What is not computed, because an earlier result stands for it. One file per mechanism; the table is what recipes can name."""

from __future__ import annotations

import functools

from reelquant.reuse.blocks import BlockReuse
from reelquant.reuse.reuse import Installed, Reuse, all_computed, install_stored, installed_reuse, remove_reuse, stored_reuse
from reelquant.reuse.temporal_table import TemporalTable, add_table, drop_unused
from reelquant.stages import Stage, register

REUSES: dict[str, type[Stage]] = {"blocks": BlockReuse, "temporal_table": TemporalTable}
register_reuse = functools.partial(register, REUSES, "reuse")

__all__ = [
    "REUSES",
    "BlockReuse",
    "Installed",
    "Reuse",
    "TemporalTable",
    "add_table",
    "all_computed",
    "drop_unused",
    "install_stored",
    "installed_reuse",
    "register_reuse",
    "remove_reuse",
    "stored_reuse",
]
