"""``reelquant recipes --for``: which roles of a pipeline's layers are sensitive, and how that is known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from reelquant.cli import console
from reelquant.cli.sensitivity import is_table

if TYPE_CHECKING:
    from reelquant.allocate import SensitivityTable

NAMED = 3  # layers of a role that are named


def evidence() -> dict[str, Any]:
    """What ``benchmarks/sensitive_roles.py`` measured: by model, damage of a weight of each role over that of a weight anywhere.

    ``trained`` are maps of trained pipelines, ``random`` those of denoisers of other families with random weights: structure alone.
    """
    return json.loads(resources.files("reelquant.recipes").joinpath("roles.json").read_text(encoding="utf-8"))


def show(model: str, as_json: bool) -> None:
    """Print the roles of a model, by its own table if there is one, else by what was measured of others.

    Args:
        model: a pipeline, or a folder or file with its table.
    """
    own = _table_of(model)
    data = _by_table(model, own) if own is not None else _by_others(model)
    if as_json:
        return console.emit(data)
    console.out.print(_shown(data))
    if not data["own"]:
        console.out.print(console.safe(_verdict(data["roles"])), soft_wrap=False)
    return console.out.print(f"[dim]{console.safe(data['because'])}[/dim]", soft_wrap=False)


def _table_of(model: str) -> SensitivityTable | None:
    from reelquant.allocate import load_table
    from reelquant.allocate.table import FILE
    from reelquant.models.pipelines import locate

    if is_table(model):
        return load_table(model)
    beside = Path(locate(model)) / FILE  # a table may be put into the folder of its pipeline
    return load_table(beside) if beside.is_file() else None


def _by_table(model: str, table: SensitivityTable) -> dict[str, Any]:
    from reelquant.allocate.roles import nearest_four, role_shares

    rows = [
        {"role": one.role, "layers": one.layers, "per_weight": one.per_weight, "damage": one.damage, "worst": list(one.worst[:NAMED])}
        for one in role_shares(table)
    ]
    because = f"measured on this model by {table.measures[0]}, weights as {nearest_four(table)}; reelquant sensitivity {model} --bits 4.5"
    return {"model": table.model, "own": True, "roles": rows, "because": because + " divides a budget by it"}


def _by_others(model: str) -> dict[str, Any]:
    from reelquant.allocate.roles import role_of
    from reelquant.damage.scene import layers_of
    from reelquant.discover import denoisers_of, discover_or_outline, plain

    pipe = _opened(model)
    layers = [layer for name, part in denoisers_of(pipe).items() for layer in layers_of(name, discover_or_outline(plain(part)))]
    counts, known = Counter(map(role_of, layers)), evidence()
    rows = []
    for role, count in counts.most_common():
        trained = {name: one["roles"][role]["per_weight"] for name, one in known["trained"].items() if role in one["roles"]}
        random = [one[role]["per_weight"] for one in known["random"].values() if role in one]
        own = [layer.name for layer in layers if role_of(layer) == role]
        rows.append({"role": role, "layers": count, "names": own[:NAMED], "trained": trained, "random": random, "always": _always(trained)})
    ways = ", ".join(f"{name} by {one['measure']}" for name, one in known["trained"].items())
    because = (
        f"damage of a weight over that of a weight anywhere, as {known['format']}. Trained: small pipelines ({ways}). "
        f"Random: {len(known['random'])} families with random weights, one call each: what their wiring does with an error, and nothing of "
        f"what training made of it. For other models this is a first guess; reelquant sensitivity {model} -o map measures this one"
    )
    rows.sort(key=lambda one: (not one["always"], -one["layers"]))
    return {"model": model, "own": False, "roles": rows, "because": because}


def _always(trained: Mapping[str, float]) -> bool:
    """Whether a role is sensitive in every trained pipeline that has it, two at least."""
    return len(trained) > 1 and min(trained.values()) > 1


def _opened(model: str) -> Any:
    from reelquant.cli.options import opened

    return opened(model)


def _shown(data: dict[str, Any]) -> Any:
    from reelquant.cli.layout import table

    if data["own"]:
        shown = table(f"Sensitive roles of {data['model']}", ["role", "most sensitive layers"], ["layers", "damage", "per weight"])
        for one in data["roles"]:
            shown.add_row(one["role"], ", ".join(one["worst"]), str(one["layers"]), f"{one['damage']:.1%}", f"{one['per_weight']:.2f}x")
        return shown
    names = list(dict.fromkeys(name for one in data["roles"] for name in one["trained"]))
    shown = table(f"Roles of {data['model']}: damage of a weight over the mean", ["role"], ["layers", *names, "random"])
    for one in data["roles"]:
        trained = [f"{one['trained'][name]:.2f}x" if name in one["trained"] else "-" for name in names]
        shown.add_row(one["role"], str(one["layers"]), *trained, _random(one["random"]))
    return shown


def _random(values: Sequence[float]) -> str:
    """Their median, and how many are above the mean of their model."""
    return f"{median(values):.2f}x ({sum(value > 1 for value in values)} of {len(values)})" if values else "-"


def _verdict(roles: Sequence[Mapping[str, Any]]) -> str:
    """The roles that are sensitive wherever they were measured."""
    found = [
        f"{one['role']} ({', '.join(one['names'])}{', ...' if one['layers'] > len(one['names']) else ''})" for one in roles if one["always"]
    ]
    return f"sensitive in every trained pipeline: {'; '.join(found) or 'no role'}"
