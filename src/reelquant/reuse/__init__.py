"""What is not computed, because an earlier result stands for it, one file per mechanism; and the record of what is installed on a model.
Layers that remember an output by themselves are in :mod:`reelquant.nn` and do not belong here."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from reelquant._errors import CheckpointError, RecipeError
from reelquant.reuse.attention import AttentionReuse
from reelquant.reuse.blocks import BlockReuse
from reelquant.reuse.reuse import CountsCells, Installed, Reuse, all_computed, installed_reuse, put, remove_reuse, stored_reuse
from reelquant.reuse.temporal_table import TemporalTable, add_table, drop_unused
from reelquant.stages import Stage, register

REUSES: dict[str, type[Stage]] = {"blocks": BlockReuse, "attention": AttentionReuse, "temporal_table": TemporalTable}
register_reuse = functools.partial(register, REUSES, "reuse")


def install_stored(model: nn.Module, stored: Mapping[str, Any]) -> None:
    """Install what a checkpoint stores.

    Raises:
        CheckpointError: for a name or an option that this version does not know.
    """
    for name, data in stored.items():
        try:
            options = {key: tuple(value) if isinstance(value, list) else value for key, value in data["options"].items()}
            put(model, name, cast(Any, REUSES[name])(**options), data["facts"])
        except (KeyError, TypeError, RecipeError) as error:
            raise CheckpointError(
                f"quantization_config.reuse.{name} cannot be installed ({type(error).__name__}: {error}); import the package that "
                f"registers it before opening the pipeline, or upgrade reelquant (known here: {', '.join(REUSES)})"
            ) from None


__all__ = [
    "REUSES",
    "AttentionReuse",
    "BlockReuse",
    "CountsCells",
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
