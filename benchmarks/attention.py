"""Numbers of attention beside float attention, in recipes whose layers are otherwise the same.

Run it from the repository root::

    python -m benchmarks.attention --pipeline tiny-dit --clips 16 --output benchmarks/results

Low-bit attention is simulated on CPUs, so this measures distances and no times. The table is ``attention-PIPELINE.md``; rows that are
already in the output are not measured again.
"""

from __future__ import annotations

from typing import Any

from benchmarks.groups import Rows, compare

CROSS, SELF = {"on": "role:cross", "scores": "float"}, {"on": "role:self", "scores": "float"}
FIRST = {"first_key": "float"}


def like(parent: str, name: str, attention: Any) -> dict[str, Any]:
    """A recipe of the library with these numbers of attention."""
    return {"extends": parent, "name": f"{parent} attention {name}", "attention": attention}


WIDE, DGQ = "w8a16", "dgq-w4a6"
SINGLE = {
    "e4m3": "e4m3 weights and values",
    "uint8": "uint8 weights, int8 values",
    "uint4": "uint4 weights, int8 values",
    "log2_4": "log2_4 weights",
    "log2_8": "log2_8 weights",
}
BITS = {WIDE: 8.08, DGQ: 4.25}
NUMBERS: dict[str, dict[str, Any]] = {
    WIDE: {
        "int8 scores": {"scores": "int8"},
        "int8 scores, queries smoothed too": {"scores": "int8", "smooth": "both"},
        "int4 scores, keys smoothed": {"scores": "int4", "smooth": "keys"},
        "int4 scores, queries smoothed too": {"scores": "int4"},
        **{words: {"scores": "float", "values": values} for values, words in SINGLE.items()},
        "log2_4 weights, cross": [CROSS | {"values": "log2_4"}],
        "log2_4 weights, cross, first key in float": [CROSS | FIRST | {"values": "log2_4"}],
        "log2_4 weights, self": [SELF | {"values": "log2_4"}],
        "int4 self, int8 cross": [{"on": "role:self", "scores": "int4"}, {"on": "role:cross", "scores": "int8"}],
    },
    DGQ: {
        "log2_6 weights, cross": [CROSS | {"values": "log2_6"}],
        "log2_6 weights, cross, first key in float": [CROSS | FIRST | {"values": "log2_6"}],
        "log2_4 weights, cross, first key in float": [CROSS | FIRST | {"values": "log2_4"}],
    },
}
CHOICES = {"4 bits": ("uint4", "log2_4"), "8 bits": ("e4m3", "uint8", "log2_8")}
"""Numbers of the weights that places and steps choose among, by the error of the output of attention in recorded calls."""


def single(values: str) -> dict[str, Any]:
    """:data:`WIDE` with one number for the weights everywhere."""
    return like(WIDE, SINGLE[values], NUMBERS[WIDE][SINGLE[values]])


def chosen(bits: str) -> dict[str, Any]:
    """:data:`WIDE` with a choice; it records calls for that, and calibrates nothing else."""
    asked = [{"on": "*", "scores": "float", "values": list(CHOICES[bits])}]
    return like(WIDE, f"weights of {bits} chosen", asked) | {"calibrate": {}}


PLAIN = {parent: f"{parent}, float attention" for parent in NUMBERS}
ROWS: Rows = {
    label: (recipe, BITS[parent], other)
    for parent, numbers in NUMBERS.items()
    for label, recipe, other in [
        (PLAIN[parent], like(parent, "float", None), ""),
        *((f"{parent}, {name}", like(parent, name, asked), PLAIN[parent]) for name, asked in numbers.items()),
    ]
} | {f"{WIDE}, weights of {bits} chosen": (chosen(bits), BITS[WIDE], PLAIN[WIDE]) for bits in CHOICES}


def main() -> None:
    """Parse the command line, measure what is missing, write the table."""
    compare("attention", ROWS, __doc__, "to float attention")


if __name__ == "__main__":
    main()
