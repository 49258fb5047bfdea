"""Tables of what ``reelquant sensitivity`` measured, as they fit the screen."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import TYPE_CHECKING

from reelquant.allocate.roles import nearest_four, role_of, role_shares
from reelquant.allocate.sizes import weight_bits
from reelquant.allocate.table import EVERY, SensitivityTable
from reelquant.cli.console import size
from reelquant.cli.layout import facts, table

if TYPE_CHECKING:
    from reelquant.allocate import Allocation, LayerBits, StepPlan
    from reelquant.cli.layout import Plain

WORDS = {"input": "inputs", "weight": "weights"}  # part of a layer -> what all of them are called


def role_table(made: SensitivityTable) -> Plain:
    """Which roles hold the damage."""
    columns = ["layers", "weights", "damage", "per weight"]
    shown = table(f"Roles, weights as {nearest_four(made)}, by {made.measures[0]}", ["role"], columns)
    for one in role_shares(made):
        shown.add_row(one.role, str(one.layers), f"{one.weights:.1%}", f"{one.damage:.1%}", f"{one.per_weight:.2f}x")
    return shown


def layer_tables(made: SensitivityTable, most: int | None) -> list[Plain]:
    """The most sensitive layers of every denoiser."""
    fmt, rows, formats = nearest_four(made), made.select(), made.formats("weight", made.measures[0])
    found = []
    for component in made.components:
        layers = sorted(made.of(component), key=lambda layer: -rows[component, layer.name, fmt].damage)
        shown = table(f"Most sensitive layers of {component}", ["layer", "role"], formats, hides=_hides(formats, fmt))
        for layer in layers[:most]:
            mark = "skip" if made.skipped(layer) else made.fixed_format(layer) or ""
            figures = [_figure(rows[component, layer.name, one].damage) for one in formats]
            shown.add_row(layer.name, f"{role_of(layer)} {mark}".strip(), *figures)
        left = len(layers) - len(layers[:most])
        shown.caption = "error of the final latents over their variance" + (f"; {left} more: --all" if left else "")
        found.append(shown)
    return found


def _hides(formats: tuple[str, ...], kept: str) -> list[str]:
    """Formats far from the kept one go first."""
    return [one for one in sorted(formats, key=lambda one: -abs(weight_bits(one) - weight_bits(kept))) if one != kept]


def step_tables(made: SensitivityTable) -> list[Plain]:
    """All inputs, and all weights, rounded at single steps."""
    found = []
    for component, (part, words) in itertools.product(made.components, WORDS.items()):
        rows = [row for row in made.rows if (row.component, row.layer, row.part) == (component, EVERY, part) and row.steps is not None]
        measure = next((one for one in made.measures if any(row.measure == one for row in rows)), None)
        formats = tuple(dict.fromkeys(row.format for row in rows if row.measure == measure))
        if not rows:
            continue
        values = {(row.format, row.steps): row.damage for row in rows if row.measure == measure}
        shown = table(f"All {words} of {component} rounded at one step alone, by {measure}", ["step"], ["timestep", *formats])
        for step, timestep in enumerate(made.timesteps[component]):
            shown.add_row(str(step), f"{timestep:.4g}", *(_figure(values.get((fmt, (step, step)))) for fmt in formats))
        found.append(shown)
    return found


def allocation_facts(found: Allocation) -> Plain:
    """How a budget was divided."""
    counts = Counter(fmt for one in found.formats.values() for fmt in one.values())
    rows = [("formats", ", ".join(f"{count} layers {fmt}" for fmt, count in sorted(counts.items(), key=lambda pair: weight_bits(pair[0]))))]
    rows.append(("size", f"{found.bits:.3f} bits a weight with scales, {size(found.nbytes)}"))
    skipped = sum(map(len, found.skipped.values()))
    rows += [("float", f"{skipped} layers, as the table says")] if skipped else []
    rows.append(("damage", f"{_figure(found.damage)} predicted"))
    if found.uniform is not None:
        fmt, damage = found.uniform
        rows.append(("uniform", f"{fmt} for all: {_figure(damage)}, {_gain(damage, found.damage)} dB worse"))
    return facts("Allocation", rows)


def step_plan_facts(plan: StepPlan) -> Plain:
    """How bits of inputs or of weights were divided among steps and layers."""
    rows = [(_group_words(plan, group), f"{', '.join(map(str, group.bits))} bits") for group in plan.groups]
    rows.append(("bits", f"{plan.mean:.2f} a step and multiplication, mean; {plan.unweighted:.2f} a step and layer"))
    rows.append(("damage", f"{_figure(plan.damage)} predicted"))
    rows.append(("uniform", f"{plan.uniform[0]} at all steps: {_figure(plan.uniform[1])}, {_gain(plan.uniform[1], plan.damage)} dB worse"))
    own, flat = plan.tried or (None, None)
    tried = "no: name the model with the same budget, and plans are sampled" if own is None or flat is None else (
        f"{_figure(own)} on other texts, uniform {_figure(flat)}, {_gain(flat, own)} dB worse"
    )  # fmt: skip
    return facts(f"Steps of {plan.component}", [*rows, ("tried", tried)])


def _group_words(plan: StepPlan, group: LayerBits) -> str:
    words = WORDS[plan.part]
    return words if len(plan.groups) == 1 else f"{words} of {len(group.layers)} layers, {group.share:.0%}"


def _gain(other: float, own: float) -> str:
    return f"{10 * math.log10(max(other, 1e-30) / max(own, 1e-30)):.1f}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
