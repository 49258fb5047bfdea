"""Exact rewrites that come before quantization. One file per mechanism; the table below is what recipes can name."""

from __future__ import annotations

from reelquant._errors import RecipeError
from reelquant.transforms.range_integrate import RangeIntegrate
from reelquant.transforms.rewrite import GroupView, Rewrite, Transform
from reelquant.transforms.rotate import Rotate
from reelquant.transforms.scale import Scale
from reelquant.transforms.shift import Shift

TRANSFORMS: dict[str, type[Transform]] = {"shift": Shift, "range_integrate": RangeIntegrate, "scale": Scale, "rotate": Rotate}


def register_transform(name: str, transform: type[Transform]) -> None:
    """Add a transform under a new name (plug-ins). Raises :class:`RecipeError` if the name is taken."""
    if name in TRANSFORMS:
        raise RecipeError(f"transform '{name}' exists already; choose another name")
    TRANSFORMS[name] = transform


__all__ = ["TRANSFORMS", "GroupView", "RangeIntegrate", "Rewrite", "Rotate", "Scale", "Shift", "Transform", "register_transform"]
