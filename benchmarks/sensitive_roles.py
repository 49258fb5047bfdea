"""Which roles of layers are sensitive: what ``reelquant recipes --for`` shows for a model without a table.

Run it from the repository root::

    python training/tiny_ltx.py build --output runs/tiny-ltx/pipeline
    python -m benchmarks.sensitive_roles                # what is measured is kept in runs/roles

It writes ``src/reelquant/recipes/roles.json``. Two kinds of evidence are kept apart there. *Trained*: maps by gradients of trained
pipelines, of all layers, those that recipes leave float among them. *Random*: the families of ``tests/families``, tiny and with random
weights; one call each, and the error of its output with one layer rounded at a time. That shows what the wiring of a family does with an
error, and nothing of what training made of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.allocate import SensitivityTable
from reelquant.allocate.roles import role_shares
from reelquant.allocate.table import Damage

FORMAT = "int4/group-64"
ALL: dict[str, Any] = {
    "name": "all-layers",
    "defaults": {"weight": {"format": "int4", "granularity": "group-64"}, "input": {"format": "int8", "granularity": "tensor"}},
}
"""No rule leaves a layer float."""
TRAINED = {"tiny-dit": ("tiny-dit", 8), "tiny-unet": ("tiny-unet", 4), "tiny-ltx": ("runs/tiny-ltx/pipeline", 8)}
"""Where a pipeline is, and its steps."""
CLIPS = 2
FILE = Path("src/reelquant/recipes/roles.json")
KEPT = Path("runs/roles")


def trained(name: str, clips: int) -> dict[str, Any]:
    """What the file says of a pipeline."""
    import reelquant

    model, steps = TRAINED[name]
    how: dict[str, Any] = dict(formats=[FORMAT], inputs=(), clips=clips, ranges=1, progress=False, num_inference_steps=steps)
    table = reelquant.sensitivity(model, KEPT / name, recipe=ALL, **how)
    return {"measure": "gradient", "clips": clips, "roles": roles(table)}


def roles(table: SensitivityTable) -> dict[str, Any]:
    """Layers, share of the weights, and damage of a weight over that of a weight anywhere, by role."""
    shares = role_shares(table, table.measures[0])
    return {one.role: {"layers": one.layers, "weights": round(one.weights, 4), "per_weight": round(one.per_weight, 3)} for one in shares}


def random(name: str) -> dict[str, Any]:
    """The same of a family with random weights, by one call."""
    from tests.families.models import FAMILIES, awake

    family = FAMILIES[name]
    return roles(by_one_call(name, awake(family.make()).eval(), family.inputs()))


@torch.no_grad()
def by_one_call(name: str, model: nn.Module, inputs: dict[str, Any]) -> SensitivityTable:
    """The error of a denoiser's output over its variance, with one layer rounded at a time."""
    from reelquant.allocate.sizes import check_weight
    from reelquant.damage.scene import layers_of
    from reelquant.discover import discover
    from reelquant.engine.plan import make_plan
    from reelquant.formats import QuantSpec, fit
    from reelquant.recipes.recipe import load_recipe

    map_ = discover(model)
    quantized = {row.layer.name for row in make_plan(load_recipe(ALL), map_, model).quantized}
    layers = [layer for layer in layers_of("denoiser", map_) if layer.name in quantized]
    spec = QuantSpec(*check_weight(FORMAT, "the format"))
    plain, rows = _output(model, inputs), []
    for layer in layers:
        module: Any = model.get_submodule(layer.name)
        before = module.weight.data
        module.weight.data = fit(spec, before.float())(before.float()).to(before.dtype)
        damage = float((_output(model, inputs) - plain).square().mean() / plain.var())
        module.weight.data = before
        rows.append(Damage("denoiser", layer.name, "weight", FORMAT, "trajectory", damage, damage, damage))
    return SensitivityTable(name, "all-layers", tuple(layers), tuple(rows))


def _output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    made = model(**inputs)
    return (made[0] if isinstance(made, tuple) else made).double()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the file."""
    from tests.families.models import FAMILIES

    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--clips", type=int, default=CLIPS, help="of each trained pipeline")
    made.add_argument("--families", nargs="*", default=list(FAMILIES), help="those with random weights; all by default")
    args = made.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in args.families:
        found[name] = random(name)
        print(name, {role: one["per_weight"] for role, one in found[name].items()}, flush=True)
    evidence = {name: trained(name, args.clips) for name in TRAINED}
    FILE.write_text(json.dumps({"format": FORMAT, "trained": evidence, "random": found}, indent=1) + "\n", encoding="utf-8")
    print(FILE)


if __name__ == "__main__":
    main()
