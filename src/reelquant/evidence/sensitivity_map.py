"""What a report draws of a sensitivity table: layers by formats, layers by ranges of steps, and the format that each layer got."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reelquant._errors import RecipeError
from reelquant.allocate import SensitivityTable, load_table
from reelquant.allocate.roles import nearest_four


def read_map(file: str | Path, quantization: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A map for every denoiser of a table, as plain data; docs/report.md has the schema.

    Args:
        file: the table, or the folder in which ``reelquant sensitivity`` left it.
        quantization: the report of quantizing the model under test, which says what its layers got; None if there is none.

    Raises:
        CheckpointError: if the table cannot be read.
        RecipeError: if it has no layer of the model under test.
    """
    table, report = load_table(file), quantization or {}
    weights = {str(row["name"]): str(row["weight"]) for row in report.get("layers", ())}
    stayed = {name for names in report.get("skipped", {}).values() for name in names}
    if quantization and not {layer.name for layer in table.layers} & (weights.keys() | stayed):
        first = table.layers[0].name
        raise RecipeError(
            f"the map at '{file}' is of '{table.model}', and none of its layers ('{first}' ...) is one of the model under test; "
            "give a map of the same model, or leave it out"
        )
    return [_map(table, name, weights if name == report.get("component") else {}) for name in table.components]


def _map(table: SensitivityTable, component: str, weights: Mapping[str, str]) -> dict[str, Any]:
    measure, layers = table.measures[0], [layer.name for layer in table.of(component)]
    formats, chosen = table.formats("weight", measure), table.select(measure)
    fmt = nearest_four(table, measure)
    ranges = table.step_ranges(component, measure)
    by_step = [table.select(measure, "weight", steps) for steps in ranges]
    return {
        "component": component,
        "measure": measure,
        "layers": layers,
        "formats": list(formats),
        "damage": [[_damage(chosen.get((component, name, one))) for one in formats] for name in layers],
        "chosen": [weights.get(name, "").replace(" ", "/") or None for name in layers],
        "steps": [list(steps) for steps in ranges],
        "step_format": fmt,
        "step_damage": [[_damage(rows.get((component, name, fmt))) for rows in by_step] for name in layers] if ranges else [],
    }


def _damage(row: Any) -> float | None:
    return None if row is None else row.damage
