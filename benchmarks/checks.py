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


PLAIN, PLAIN_TOKEN, PLAIN_FLOAT = "int8 per tensor, inputs int8 per tensor", "the same, inputs per token", "the same, inputs float"
ROWS: Rows = {
    PLAIN: ({"extends": "dfq-w8a8", "name": "w8a8 tensor", "steps": []}, 8, ""),
    "dfq-w8a8": ("dfq-w8a8", 8, PLAIN),
    PLAIN_TOKEN: (dfq("plain token", TOKEN, equalized=False), 8, ""),
    "dfq-w8a8, inputs per token": (dfq("dfq token", TOKEN), 8, PLAIN_TOKEN),
    PLAIN_FLOAT: (dfq("plain w8", FLOAT, equalized=False), 8, ""),
    "dfq-w8a8, inputs float": (dfq("dfq w8", FLOAT), 8, PLAIN_FLOAT),
}

if __name__ == "__main__":
    compare("checks", ROWS, __doc__, "to the plain row of the same bits")
