"""Which roles of layers are sensitive in the bundled pipelines: what ``reelquant recipes --for`` shows for a model without a table.

Run it from the repository root, after ``benchmarks.sensitivity`` has measured both pipelines::

    python -m benchmarks.sensitive_roles

It writes ``src/reelquant/recipes/roles.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.sensitivity import KEPT
from reelquant.allocate import SensitivityTable, load_table
from reelquant.allocate.roles import nearest_four, role_shares
from reelquant.models.pipelines import BUNDLED

MEASURE = "gradient"
FILE = Path("src/reelquant/recipes/roles.json")


def roles(table: SensitivityTable) -> dict[str, Any]:
    """What the file says of a pipeline."""
    shares = role_shares(table, MEASURE)
    found = {one.role: {"layers": one.layers, "weights": round(one.weights, 4), "per_weight": round(one.per_weight, 3)} for one in shares}
    return {"measure": MEASURE, "clips": len(table.settings["prompts"]), "roles": found}


def main() -> None:
    """Read the tables and write the file."""
    tables = {name: load_table(KEPT / name) for name in BUNDLED}
    data = {"format": nearest_four(tables[BUNDLED[0]], MEASURE), "trained": {name: roles(table) for name, table in tables.items()}}
    FILE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(FILE)


if __name__ == "__main__":
    main()
