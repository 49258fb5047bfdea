"""Removed weights: two of every four, or a third, chosen with compensation and by size alone, beside the same recipe with all weights;
and channels of attention's values that are left out.

Run it from the repository root::

    python -m benchmarks.removal --pipeline tiny-dit --clips 64 --output benchmarks/results
    python -m benchmarks.removal --pipeline tiny-dit --clips 16 --output benchmarks/results --only "keep 60:64" "keep 52:64"

:mod:`benchmarks.beside` says how. The table is ``removal-PIPELINE.md``.
"""

from __future__ import annotations

from typing import Any

from benchmarks.beside import Rows, main
from benchmarks.reel import steps_of
from reelquant.recipes.recipe import load_recipe

PARENT, NARROW = "prune-35", "narrow-w8a8"


def keeping(keep: str, *, compensate: bool = True) -> dict[str, Any]:
    """``prune-35`` with another share of the weights, or with the largest ones as they are."""
    steps = [step | {"keep": keep, "compensate": compensate} if step.get("solve") == "sparse" else step for step in steps_of(PARENT)]
    return {"extends": PARENT, "name": f"keep {keep}{'' if compensate else ', largest'}", "steps": steps}


def narrowing(keep: float) -> dict[str, Any]:
    """``narrow-w8a8`` with another share of the channels."""
    steps = [step | {"keep": keep} if step.get("transform") == "narrow_values" else step for step in steps_of(NARROW)]
    return {"extends": NARROW, "name": f"narrow {keep}", "steps": steps}


def values_in(bits: int) -> dict[str, Any]:
    """``qvd-w8a8`` with as few bits for values and output projections as take the bytes of fewer channels in 8 bits."""
    rule = {"on": "maybe:*.to_v | maybe:*.to_out*", "weight": {"format": f"int{bits}", "granularity": "channel"}}
    rules = [one.model_dump(exclude_unset=True) for one in load_recipe("qvd-w8a8").rules]
    return {"extends": "qvd-w8a8", "name": f"{bits}-bit values", "rules": [*rules, rule]}


SHARES = ("60:64", "52:64", "45:64", "42:64", "32:64")
ROWS: Rows = {
    "qvd-w8a8": ("qvd-w8a8", ""),
    "2:4, largest": (keeping("2:4", compensate=False), "qvd-w8a8"),
    "sparse24-w8a8": ("sparse24-w8a8", "2:4, largest"),
    **{f"keep {keep}, largest": (keeping(keep, compensate=False), "qvd-w8a8") for keep in SHARES},
    **{f"keep {keep}": (keeping(keep), f"keep {keep}, largest") for keep in SHARES},
    "6-bit values": (values_in(6), "qvd-w8a8"),
    "4-bit values": (values_in(4), "qvd-w8a8"),
    NARROW: (NARROW, "6-bit values"),
    "narrow 0.5": (narrowing(0.5), "4-bit values"),
}


if __name__ == "__main__":
    main(ROWS, "removal", __doc__)
