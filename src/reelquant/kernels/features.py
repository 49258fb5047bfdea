"""Features of a layer: names of what it uses beside a weight and a bias, and the one question that asks whether all of them are taken.

Kernels, graphs and exporters each state the names that they take. A field that is added to :class:`~reelquant.kernels.Operands` or to the
layout of a layer is a feature at once, so code that does not know it refuses the layer instead of computing something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from torch import Tensor

from reelquant.formats import Granularity

WORDS = {
    "input": "rounded inputs",
    "shift": "a shift of the input",
    "scale": "a scale of the input",
    "rotate": "rotated inputs",
    "mix": "inputs whose channels are mixed first",
    "window": "a convolution",
    "slots": "input scales per denoising step",
    "table": "a table of outputs",
    "unused": "an output that is never needed",
    "input_groups": "inputs with a scale per group of channels",
    "scale_codes": "scales of eight bits",
    "bands": "inputs whose frames are mixed",
    "kept": "removed weights",
    "rows": "rows that are not stored",
    "columns": "columns that are not stored",
    "cfg_halves": "input scales for each half of guidance",
}
"""How messages call the features that are known; others are called by their name."""


def features_in_use(data: Any, plain: Collection[str]) -> frozenset[str]:
    """Names of the fields of a dataclass that do not hold their default; fields without a default are always in use.

    Args:
        data: an instance.
        plain: fields that are not features.
    """
    fields = (field for field in dataclasses.fields(data) if field.name not in plain)
    return frozenset(field.name for field in fields if not _holds_default(field, getattr(data, field.name)))


def grain_features(weight: Granularity, input: Granularity | None) -> frozenset[str]:
    """Features of who shares a scale, and of the numbers that scales are."""
    groups = input is not None and input.kind == "group"
    codes = any(grain is not None and grain.scale != "float" for grain in (weight, input))
    return frozenset(name for name, used in (("input_groups", groups), ("scale_codes", codes)) if used)


def _holds_default(field: dataclasses.Field[Any], value: Any) -> bool:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return value is default or (not isinstance(value, Tensor) and not isinstance(default, Tensor) and bool(value == default))


def not_taken(features: Collection[str], takes: Collection[str]) -> str | None:
    """The features that are not taken, in words; None if all are."""
    missing = sorted(set(features) - set(takes))
    return ", ".join(WORDS.get(name, f"the feature '{name}'") for name in missing) or None
