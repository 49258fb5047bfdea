"""Bits over steps and groups of layers: the map that is read off a table, and the plans made of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reelquant._errors import RecipeError
from reelquant.allocate import Damage, LayerFacts, SensitivityTable, Tried, allocate_steps, load_table
from reelquant.allocate.exchange import together
from reelquant.allocate.step_map import step_map
from reelquant.allocate.steps import OVER, _grams, plans_over
from reelquant.recipes.allocated import with_steps

NAME, STEPS, BITS = "transformer", 3, (5, 6, 7, 8)
PRODUCTS = (100.0, 100.0, 800.0)  # of three layers: a tenth, a tenth, eight tenths
SIZES = np.array([[1.0, 8.0, 1.0], [64.0, 64.0, 512.0], [1.0, 1.0, 1.0]])  # of damages, layers x steps: the second layer holds most


def made(sizes: np.ndarray = SIZES, part: Any = "input", products: tuple[float, ...] = PRODUCTS, cosine: float = 0.0) -> SensitivityTable:
    """A bit less costs four times as much, in all layers and at all steps."""
    layers = tuple(LayerFacts(NAME, f"blocks.{n}", "Linear", "main", (8, 8), products=one) for n, one in enumerate(products))
    rows = []
    for bits, step in itertools.product(BITS, range(STEPS)):
        values = [float(one) * 4.0**-bits for one in sizes[:, step]]
        rows += [
            Damage(NAME, layer.name, part, f"int{bits}/token", "gradient", one, one, one, (step, step))
            for layer, one in zip(layers, values, strict=True)
        ]
        rows.append(Damage(NAME, "*", part, f"int{bits}/token", "gradient", sum(values), 0.0, 0.0, (step, step)))
    near = [[cosine ** abs(one - other) for other in range(STEPS)] for one in range(STEPS)]
    return SensitivityTable("made", "x", layers, tuple(rows), timesteps={NAME: (3.0, 2.0, 1.0)}, together={(NAME, part, "gradient"): near})


def test_layers_with_the_same_ideal_bits_are_a_group() -> None:
    found = step_map(made(), NAME, None, "input")
    # damage per multiplication: 0.1, 6.4 and 0.004: 1.6, 4.6 and -0.8 bits from the mean over multiplications, 3 at most
    assert found.groups == (("blocks.2",), ("blocks.0",), ("blocks.1",)) and found.shares == pytest.approx([0.8, 0.1, 0.1])
    assert found.damage[2] == pytest.approx(np.outer(SIZES[1], 4.0 ** -np.array(BITS)))
    alike = step_map(made(np.array([[1.0] * 3, [1.0] * 3, [9.0] * 3])), NAME, None, "input")
    assert alike.groups == (("blocks.0", "blocks.1", "blocks.2"),)


def test_a_step_has_the_damage_of_its_own_row_however_layers_share_it() -> None:
    table = made()
    sampled = [
        Damage(NAME, "*", "input", f"int{bits}/token", "trajectory", 7.0 * 4.0**-bits * (step + 1), 0.0, 0.0, (step, step))
        for bits, step in itertools.product((5, 8), range(STEPS))
    ]
    found = step_map(replace(table, rows=(*table.rows, *sampled)), NAME, None, "input")
    assert found.measure == "trajectory" and found.choices == BITS
    assert found.damage.sum(0) == pytest.approx(np.outer([7.0, 14.0, 21.0], 4.0 ** -np.array(BITS)))
    assert found.damage[2] / found.damage.sum(0) == pytest.approx(np.outer(SIZES[1] / SIZES.sum(0), [1] * 4))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("part", ["input", "weight"])
def test_no_plan_is_above_the_budget_or_predicted_worse_than_uniform_and_the_best_is_near_the_best_of_all(seed: int, part: Any) -> None:
    generator = np.random.default_rng(seed)
    products = tuple(float(one) for one in generator.lognormal(0, 1, 3))
    table = made(generator.lognormal(0, 2, (3, STEPS)), part, products, cosine=0.8 if part == "weight" else 0.2)
    found, budget = step_map(table, NAME, None, part), 6.2
    plans = plans_over(table, budget, NAME, part=part)
    assert list(plans) == list(OVER)
    for over, plan in plans.items():
        assert plan.mean <= budget * (1 + 1e-9) and plan.damage <= plan.uniform[1] * (1 + 1e-9)
        bits = {name: group.bits for group in plan.groups for name in group.layers}
        rows = [bits.get(layer.name, bits.get("*")) for layer in table.layers]
        assert plan.mean == pytest.approx(np.average([np.mean(row) for row in rows if row], weights=products))
        assert over in ("steps", "both") or all(len(set(group.bits)) == 1 for group in plan.groups)
        assert over in ("layers", "both") or len(plan.groups) == 1
    grams, sizes = _grams(found), np.repeat(found.shares, STEPS)
    units = len(found.groups) * STEPS
    inside = [one for one in itertools.product(range(len(BITS)), repeat=units) if sizes @ np.array(BITS)[list(one)] <= budget * STEPS]
    best = min(together(grams, one) for one in inside)
    assert best * (1 - 1e-9) <= plans["both"].damage <= 1.05 * best


def test_layers_that_hold_the_damage_get_the_bits_where_steps_alone_gain_nothing() -> None:
    table = made(np.array([[1.0] * 3, [256.0] * 3, [1.0] * 3]))
    plan = allocate_steps(table, 6.0)
    assert allocate_steps(table, 6.0, over="steps").damage == plan.uniform[1] and plan.over in ("layers", "both")
    bits = {name: group.bits for group in plan.groups for name in group.layers}
    assert bits["blocks.1"] == (8, 8, 8) and plan.mean <= 6.0 + 1e-9 and plan.damage < plan.uniform[1] / 4


def test_tables_that_do_not_tell_layers_apart_are_planned_over_steps() -> None:
    table = made(products=(0.0, 0.0, 0.0))  # of an earlier version
    assert list(plans_over(table, 6.0, NAME)) == ["nothing", "steps"]
    with pytest.raises(RecipeError, match="does not tell layers apart at all steps; measure with --by-step"):
        allocate_steps(table, 6.0, over="both")
    with pytest.raises(RecipeError, match="no plan over 'step'"):
        allocate_steps(table, 6.0, over="step")  # type: ignore[arg-type]


def trials(table: SensitivityTable, damages: dict[str, float]) -> SensitivityTable:
    table = table.as_saved()
    plans = plans_over(table, 6.0, NAME)
    return replace(table, tried=tuple(Tried(NAME, "input", plans[over].content, one, one, one) for over, one in damages.items()))  # type: ignore[index]


def test_what_plans_did_counts_and_not_what_was_predicted(tmp_path: Path) -> None:
    table = trials(made(), {"nothing": 0.3, "steps": 0.2, "layers": 0.5, "both": 0.4})
    plan = allocate_steps(load_table(table.save(tmp_path / "sensitivity.json")), 6.0)
    assert plan.over == "steps" and plan.tried == (0.2, 0.3)
    worse = allocate_steps(trials(made(), {"nothing": 0.1, "steps": 0.2, "layers": 0.5, "both": 0.4}), 6.0)
    assert worse.over == "nothing" and worse.groups[0].bits == (6, 6, 6)
    some = allocate_steps(trials(made(), {"nothing": 0.1, "steps": 0.2}), 6.0)
    assert some.tried is None and some.over == min(plans_over(made(), 6.0, NAME).values(), key=lambda one: one.damage).over


def test_a_plan_is_a_recipe_that_says_the_same() -> None:
    table = made()
    plan = allocate_steps(table, 6.0, over="both")
    recipe = with_steps("minmax-w8a8", [*plan.entries(table), {"weights": [8, 7, 6]}])
    stage = next(entry.stage for entry in recipe.entries if entry.name == "step_bits")
    first, *apart = stage.parts  # type: ignore[attr-defined]
    assert first.on == "*" and first.weights == (8, 7, 6) and apart
    said = {name: part.inputs for part in apart for name in part.on.split(" | ")}
    assert all(said.get(name, first.inputs) == group.bits for group in plan.groups for name in group.layers)
