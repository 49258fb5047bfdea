"""Recipes that change the form of a layer (scales, rotations, low-rank branches, permutations) beside plain rounding of like bytes.

Run it from the repository root::

    python -m benchmarks.forms --pipeline tiny-dit --clips 16 --output benchmarks/results

First, last, temporal and prompt layers are the same in all rows. Input scales are found at run time and take no storage. Bits per weight
are those of a 192 x 192 layer with its scales and its branch. Rows that are already in the output are not measured again.
"""

from __future__ import annotations

from typing import Any

from benchmarks.groups import Rows, compare, integers

BRANCH = 32 / 192  # bits per weight that a direction of a 192 x 192 layer takes


def plain(name: str, weight: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Weights by GPTQ and inputs rounded as they come."""
    solve = [{"solve": "gptq", "correct_bias": True, "on": "role:main | role:temporal | role:prompt"}]
    return {"extends": "svdquant-w4a4", "name": name, "defaults": {"weight": weight, "input": inputs}, "steps": solve}


def smoothed(name: str, parent: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """A recipe of the library with other steps before the codes of its weights are chosen."""
    solve = [{"solve": "gptq", "correct_bias": True, "on": "role:main | role:temporal | role:prompt"}]
    return {"extends": parent, "name": name, "steps": [step | {"on": "role:main"} for step in steps] + solve}


TOKEN8 = {"format": "int8", "granularity": "token"}
NVFP4 = {"format": "e2m1", "granularity": "group-16", "scale": "e4m3"}
SEARCH: dict[str, Any] = {"transform": "scale_search", "grid": 20, "lone": True}
DITAS: dict[str, Any] = {  # its exponent as SmoothQuant has it
    "extends": "ditas-w4a8",
    "name": "ditas alpha 0.5",
    "steps": [
        {"transform": "scale", "on": "role:main"},
        {"branch": "lowrank", "rank": 32, "share": 0.042, "on": "role:main"},
        {"solve": "nearest", "correct_bias": True, "on": "role:main | role:temporal | role:prompt"},
    ],
}
W8A8 = {
    "extends": "bct-w8a8",
    "name": "w8a8 tensor",
    "defaults": {"weight": {"granularity": "channel"}, "input": {"granularity": "tensor"}},
}
INT4, W4A6, W4A8 = "int4, groups of 32", "int4, groups of 64, inputs uint6 in groups", "int4, groups of 64, inputs int8 per token"
ROWS: Rows = {
    INT4: (integers("int4", "group-32"), 4.5, ""),
    "int4, groups of 10": (integers("int4", "group-10"), 5.67, INT4),
    "int4, groups of 10, inputs in groups of 64": (plain("int4 group-10", {"granularity": "group-10"}, {}) | {"steps": []}, 5.67, INT4),
    "int4, groups of 64, gptq": (plain("int4 group-64 gptq", {}, {}), 4.25, INT4),
    "int4, groups of 64, scale_search, gptq": (smoothed("int4 group-64 scale search", "svdquant-w4a4", [SEARCH]), 4.25, INT4),
    "svdquant-w4a4": ("svdquant-w4a4", 4.25 + 8 * BRANCH, "int4, groups of 10, inputs in groups of 64"),
    "svdquant-w4a4 with NVFP4 numbers": (
        {"extends": "svdquant-w4a4", "name": "svdquant nvfp4", "defaults": {"weight": NVFP4, "input": NVFP4}},
        4.5 + 8 * BRANCH,
        "int4, groups of 10",
    ),
    "hq-dit-w4a4": ("hq-dit-w4a4", 4.08, INT4),
    W4A6: (plain("w4a6 group-64", {}, {"format": "uint6"}), 4.25, ""),
    "dgq-w4a6": ("dgq-w4a6", 4.25, W4A6),
    W4A8: (plain("w4a8 group-64 int8 token", {}, TOKEN8), 4.25, ""),
    "viditq-w4a8": ("viditq-w4a8", 4.25, W4A8),
    "ditas-w4a8 with the exponent 0.5": (DITAS, 4.38 + 8 * BRANCH, ""),
    "ditas-w4a8": ("ditas-w4a8", 4.38 + 8 * BRANCH, "ditas-w4a8 with the exponent 0.5"),
    "int8, inputs int8 per tensor": (W8A8, 8.08, ""),
    "bct-w8a8": ("bct-w8a8", 8.25, "int8, inputs int8 per tensor"),
}
AGAINST = (
    "to int4 in groups of 32 for rows of 4-bit inputs, but those of `svdquant-w4a4` to plain int4 of its bytes and its input groups "
    "(groups of 10, inputs in groups of 64), and with NVFP4 numbers to int4 in groups of 10 on both sides; else to the plain row above"
)


if __name__ == "__main__":
    compare("forms", ROWS, __doc__, AGAINST)
