"""Which roles of layers are sensitive, over the bundled pipelines and over tiny random models of every family: the evidence that
``reelquant recipes --for`` shows for a model that was not measured itself.

Run it from the repository root, after ``benchmarks.sensitivity`` has measured both bundled pipelines::

    python -m benchmarks.sensitive_roles

It writes ``src/reelquant/recipes/roles.json``. Of the random models (``tests/families``) one call is made, and the damage is to the output
of that call: there is nothing to sample that would mean anything. Families whose model gives no gradients are left out by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.sensitivity import KEPT
from reelquant._progress import Silent
from reelquant.allocate import SensitivityTable, load_table
from reelquant.allocate.roles import role_shares
from reelquant.damage.gains import Gains
from reelquant.damage.gradient import by_gradient
from reelquant.damage.kept import Kept
from reelquant.damage.scene import Target, layers_of
from reelquant.discover import discover
from reelquant.engine.plan import make_plan
from reelquant.observe import RecordedCall
from reelquant.recipes.recipe import load_recipe
from tests.families.models import FAMILIES, awake

FILE = Path("src/reelquant/recipes/roles.json")
FORMAT, PROBES = "int4/group-64", 8
TRAINED = ("tiny-dit", "tiny-unet")


def of_family(name: str) -> SensitivityTable:
    """The table of a tiny random model, by gradients of one call."""
    torch.manual_seed(0)
    model, inputs = awake(FAMILIES[name].make()).eval(), FAMILIES[name].inputs()
    map_ = discover(model)
    plan = make_plan(load_recipe("w4a16"), map_, model)
    quantized = {row.layer.name for row in plan.quantized}
    layers = tuple(layer for layer in layers_of(name, map_) if layer.name in quantized)
    with torch.no_grad():
        call = RecordedCall((), inputs, model(**inputs))
    target = Target(name, model, plan, layers, [0.0], [call] * PROBES)
    seen = by_gradient(Silent(), target, [FORMAT, "int8/channel"], [], Kept(None, None))
    return SensitivityTable(name, "w4a16", layers, tuple(seen.rows(Gains((1.0,), {}), [])), timesteps={name: [0.0]})


def roles(table: SensitivityTable) -> dict[str, Any]:
    """What the file says of a model."""
    found = {
        one.role: {"layers": one.layers, "weights": round(one.weights, 4), "per_weight": round(one.per_weight, 3)}
        for one in role_shares(table)
    }
    return {"measure": table.measures[0], "roles": found}


def main() -> None:
    """Measure the families, read the tables of the bundled pipelines, and write the file."""
    trained = {name: roles(load_table(KEPT / name)) for name in TRAINED}
    random: dict[str, Any] = {}
    left: list[str] = []
    for name in FAMILIES:
        try:
            random[name] = roles(of_family(name))
        except Exception as error:  # a family may ask for more than a call by keywords
            left.append(name)
            print(f"{name} is left out: {type(error).__name__}: {str(error)[:200]}", flush=True)
        else:
            print(name, {role: one["per_weight"] for role, one in random[name]["roles"].items()}, flush=True)
    data = {"format": FORMAT, "trained": trained, "random": random, "left_out": left}
    FILE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(FILE, len(random), "families,", len(left), "left out")


if __name__ == "__main__":
    main()
