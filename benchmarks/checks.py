"""Recipes beside the plain row of the same bits that each has to beat.

Run it from the repository root::

    python -m benchmarks.checks --pipeline tiny-unet --clips 16 --output benchmarks/results

Rows that are already in the output are not measured again. Rows are kept in ``rows.jsonl``; the table is ``checks-PIPELINE.md``.
"""

from __future__ import annotations

from typing import Any

from benchmarks.groups import Rows, compare

TOKEN = {"input": {"granularity": "token"}}
FLOAT: dict[str, Any] = {"input": None}


def dfq(name: str, numbers: dict[str, Any], *, equalized: bool = True) -> dict[str, Any]:
    """``dfq-w8a8`` with other inputs, or without its only step."""
    return {"extends": "dfq-w8a8", "name": name, "defaults": numbers} | ({} if equalized else {"steps": []})


def resq(name: str, bits: int) -> dict[str, Any]:
    """``resq-w8a4`` without the mix, inputs rounded to so many bits as they come."""
    solve = {"solve": "gptq", "correct_bias": True, "on": "role:main | role:temporal | role:prompt"}
    token = {"format": "int8", "granularity": "token", "dynamic": True}
    rules = [{"on": "role:entry | role:exit", "skip": True}, {"on": "role:temporal | role:prompt", "input": token}]
    return {"extends": "resq-w8a4", "name": name, "defaults": {"input": {"format": f"int{bits}"}}, "rules": rules, "steps": [solve]}


def static(name: str, bits: int, *, split: bool) -> dict[str, Any]:
    """``minmax-w8a8`` with other bits of inputs, with and without halves that have ranges of their own at skip seams."""
    steps = [*([{"transform": "split", "on": "role:main"}] if split else []), {"solve": "nearest"}]
    return {"extends": "minmax-w8a8", "name": name, "defaults": {"input": {"format": f"uint{bits}"}}, "steps": steps}


def compensated(name: str, *, branch: bool, train: bool, relation: float = 0.0) -> dict[str, Any]:
    """Parts of ``q-vdit-w4a6``."""
    learn = {"reconstruct": "scales", "scope": "model", "on": "role:main", "relation": relation}
    steps = [
        *([{"branch": "frame_rank_one", "on": "role:main"}] if branch else []),
        {"solve": "gptq", "correct_bias": True, "on": "role:main | role:temporal | role:prompt"},
        *([learn | ({"branch_rate": 0.001} if branch else {})] if train else []),
    ]
    return {"extends": "q-vdit-w4a6", "name": name, "steps": steps}


PLAIN, PLAIN_TOKEN, PLAIN_FLOAT = "int8 per tensor, inputs int8 per tensor", "the same, inputs per token", "the same, inputs float"
ROWS: Rows = {
    PLAIN: ({"extends": "dfq-w8a8", "name": "w8a8 tensor", "steps": []}, 8, ""),
    "dfq-w8a8": ("dfq-w8a8", 8, PLAIN),
    PLAIN_TOKEN: (dfq("plain token", TOKEN, equalized=False), 8, ""),
    "dfq-w8a8, inputs per token": (dfq("dfq token", TOKEN), 8, PLAIN_TOKEN),
    PLAIN_FLOAT: (dfq("plain w8", FLOAT, equalized=False), 8, ""),
    "dfq-w8a8, inputs float": (dfq("dfq w8", FLOAT), 8, PLAIN_FLOAT),
    "int8, inputs int4 per token": (resq("w8a4 token", 4), 8, ""),
    "resq-w8a4": ("resq-w8a4", 8, "int8, inputs int4 per token"),
    "int8, inputs uint6 per tensor": (static("minmax w8a6", 6, split=False), 8, ""),
    "the same, split at seams": (static("minmax split w8a6", 6, split=True), 8, "int8, inputs uint6 per tensor"),
    "int8, inputs uint8 per tensor": (static("minmax w8a8", 8, split=False), 8, ""),
    "int8, inputs uint8 per tensor, split at seams": (static("minmax split w8a8", 8, split=True), 8, "int8, inputs uint8 per tensor"),
    "int4, inputs int6 per token, gptq": (compensated("w4a6 token", branch=False, train=False), 4, ""),
    "the same, scales trained": (compensated("q-vdit scales", branch=False, train=True), 4, "int4, inputs int6 per token, gptq"),
    "q-vdit-w4a6 without relations": (compensated("q-vdit no relation", branch=True, train=True), 4.2, "int4, inputs int6 per token, gptq"),
    "q-vdit-w4a6": ("q-vdit-w4a6", 4.2, "int4, inputs int6 per token, gptq"),
}

if __name__ == "__main__":
    compare("checks", ROWS, __doc__, "to the plain row of the same bits")
