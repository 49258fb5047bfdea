"""What the layers of a stored pipeline need of plug-ins: members of tables that this library does not come with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from reelquant._errors import CheckpointError
from reelquant._plugins import provider
from reelquant.branches import BRANCHES, branch_name
from reelquant.formats import FORMATS, RANGES
from reelquant.nn import LayerLayout
from reelquant.reuse import REUSES

TABLES: dict[str, Mapping[str, Any]] = {"format": FORMATS, "range": RANGES, "branch": BRANCHES, "reuse": REUSES}
"""First word of a need -> the table that its second word must be in: ``format mine_6``. What only chooses codes is needed no more."""

IMPORT_FIRST = "import the package that registers it before the pipeline is opened, or upgrade reelquant"


def needed(layouts: Iterable[LayerLayout], reuse: Mapping[str, Any]) -> dict[str, str]:
    """What layers and a reuse take from plug-ins, and the module of each."""
    words = {f"reuse {name}" for name in reuse}
    for layout in set(layouts):
        for tensor in filter(None, (layout.weight, layout.input)):
            words |= {f"format {tensor.format}", f"range {tensor.range}"}
        words |= {f"branch {branch_name(branch)}" for branch in layout.branches}
    found = {word: provider(_member(word)) for word in sorted(words)}
    return {word: module for word, module in found.items() if module}


def check_here(needs: Mapping[str, str]) -> None:
    """Refuse a pipeline whose plug-in is not imported.

    Raises:
        CheckpointError: naming what is missing, and its module.
    """
    for word, module in needs.items():
        if _member(word) is not None:
            continue
        table, _, name = word.partition(" ")
        way = f"import {module} (reelquant --plugin {module} ...)"
        way = "register it again, as the script did that quantized the pipeline" if module == "__main__" else way
        needs_it = f"this pipeline needs the {table} '{name}' of the plug-in '{module}', which is not imported"
        raise CheckpointError(f"{needs_it}; before the pipeline is opened, {way}")


def _member(word: str) -> Any:
    table, _, name = word.partition(" ")
    return TABLES.get(table, {}).get(name)
