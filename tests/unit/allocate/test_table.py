"""The file of a sensitivity table, and what people write into it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from reelquant._errors import CheckpointError, RecipeError, SiteError
from reelquant.allocate import METHODS, Configuration, Damage, LayerFacts, SensitivityTable, StepPlan, allocate, allocate_steps, load_table
from reelquant.allocate.exchange import together
from reelquant.allocate.sizes import weight_bytes
from reelquant.recipes.allocated import allocated, recipe_text, with_steps
from reelquant.recipes.recipe import load_recipe

FORMATS = ("int3/group-64", "int4/group-64", "int6/channel", "int8/channel")
SHAPES = ((64, 128), (128, 64), (32, 256), (96, 96), (64, 64, 3, 3), (48, 128))


def made(*components: str, seed: int = 0) -> SensitivityTable:
    """Layers whose damages differ by orders of magnitude; every bit less costs about four times as much."""
    generator = np.random.default_rng(seed)
    layers, rows = [], []
    for component in components or ("transformer",):
        for number, shape in enumerate(SHAPES * 3):
            layer = LayerFacts(component, f"blocks.{number}.to_q", "Linear", "main", shape, f"blocks.{number}")
            size = generator.lognormal(-8, 2)
            for fmt, bits in zip(FORMATS, (3, 4, 6, 8), strict=True):
                damage = size * 4.0**-bits * generator.lognormal(0, 0.1)
                rows.append(Damage(component, layer.name, "weight", fmt, "gradient", damage, 0.9 * damage, 1.1 * damage))
            layers.append(layer)
        rows += [
            Damage(component, "*", "input", fmt, "gradient", 4.0 ** (8 - bits) * power, 0.0, 1.0, (step, step))
            for fmt, bits in (("int4/token", 4), ("int5/token", 5), ("int6/token", 6), ("int8/token", 8))
            for step, power in enumerate((1.0, 100.0, 1.0, 1.0, 50.0, 1.0))
        ]
    times = {component: tuple(float(1000 - 100 * step) for step in range(6)) for component in components or ("transformer",)}
    return SensitivityTable("made", "w4a16", tuple(layers), tuple(rows), timesteps=times, settings={"clips": 2})


def test_a_table_is_what_was_saved(tmp_path: Path) -> None:
    table = replace(made(), configurations=(Configuration("transformer", {"blocks.0.to_q": "int3/group-64"}, 0.5),), skip=("blocks.1",))
    read = load_table(table.save(tmp_path / "map" / "sensitivity.json"))
    assert (read.layers, read.configurations, read.skip, read.timesteps) == (
        table.layers, table.configurations, table.skip, {"transformer": list(table.timesteps["transformer"])},
    )  # fmt: skip
    for one, other in zip(read.rows, table.rows, strict=True):
        assert one.damage == pytest.approx(other.damage, rel=1e-4) and replace(one, damage=0, low=0, high=0) == replace(
            other, damage=0, low=0, high=0
        )
    assert load_table(tmp_path / "map").layers == table.layers  # the folder does as well
    assert [file.name for file in (tmp_path / "map").iterdir()] == ["sensitivity.json"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"version": 2}, CheckpointError, "has version 2, and this release reads version 1"),
        ({"kind": "else"}, CheckpointError, "is not a sensitivity table"),
        ({"rows": [["unet", "a", "weight", "int4/channel", "gradient", None, None, -1.0, 0, 0]]}, CheckpointError, "a damage is a number"),
        ({"rows": [["unet", "a", "weight", "int4/channel", "guess", None, None, 1.0, 0, 0]]}, CheckpointError, "measure of layer 'a'"),
        ({"rows": [[1]]}, CheckpointError, "is damaged"),
        ({"skip": ["blocks.99"]}, SiteError, "pattern 'blocks.99' matches none of 18 layers"),
        ({"skip": [3]}, CheckpointError, "'skip' holds 3"),
        ({"fixed": {"blocks.0": "int44/channel"}}, RecipeError, "unknown number format 'int44'"),
        ({"fixed": {"blocks.0": "int4"}}, RecipeError, "FORMAT/GRANULARITY"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_error(tmp_path: Path, change: dict[str, object], error: type[Exception], message: str) -> None:
    file = made().save(tmp_path / "sensitivity.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(error, match=message):
        load_table(file)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "surrogate"])
@pytest.mark.parametrize("bits", [3.6, 4.5])
def test_every_method_meets_the_budget_and_is_never_predicted_below_uniform(method: str, bits: float) -> None:
    table = made("transformer", "transformer_2")
    found = allocate(table, bits=bits, method=method)
    assert 0.985 * bits <= found.bits <= bits * (1 + 1e-9)  # few layers: sums are coarse
    assert found.uniform is not None and found.damage <= found.uniform[1] * (1 + 1e-9)
    assert found == allocate(table, bits=bits, method=method)
    shapes = {(layer.component, layer.name): layer.shape for layer in table.layers}
    spent = sum(weight_bytes(fmt, shapes[name, layer]) for name, one in found.formats.items() for layer, fmt in one.items())
    assert spent == found.nbytes == allocate(table, nbytes=bits * found.weights / 8, method=method).nbytes


def test_the_integer_program_is_never_worse_than_the_others() -> None:
    damages = {method: allocate(made(seed=3), bits=4.4, method=method).damage for method in ("milp", "greedy", "sampled")}
    assert damages["milp"] <= min(damages.values()) * (1 + 1e-9)


def test_skipped_layers_stay_float_and_fixed_ones_get_their_format() -> None:
    table = made().edited(["blocks.0 | blocks.1"], {"blocks.*": "int4/group-64", "blocks.2": "int8/channel", "blocks.3": "int5/channel"})
    found = allocate(table, bits=4.6)
    assert found.skipped["transformer"] == ("blocks.0.to_q", "blocks.1.to_q")
    formats = found.of()
    assert formats.pop("blocks.2.to_q") == "int8/channel" and formats.pop("blocks.3.to_q") == "int5/channel"
    assert set(formats.values()) == {"int4/group-64"} and len(formats) == len(table.layers) - 4


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"bits": 3.0}, r"3.000 bits per weight .* is out of reach: .* take 3\.\d+ to 8\.\d+"),
        ({}, "in bits per weight or in bytes, one of them"),
        ({"bits": 4.0, "nbytes": 3.0}, "one of them"),
        ({"bits": 4.5, "method": "mlip"}, "did you mean 'milp'"),
        ({"bits": 4.5, "formats": ["int4/channel", "int8/channel"]}, "not measured with 'int4/channel'"),
        ({"bits": 4.5, "measure": "trajectory"}, "no damages of weights measured by 'trajectory'; it has: gradient"),
        ({"bits": 4.5, "method": "surrogate"}, "learns from allocations that were tried, and there are 0"),
    ],
)
def test_a_budget_that_cannot_be_divided_is_one_sentence(asked: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        allocate(made(), **asked)  # type: ignore[arg-type]


def test_a_recipe_says_the_allocation() -> None:
    found = allocate(made().edited(["blocks.0"]), bits=4.5)
    text = recipe_text(allocated("mixed-w4.5a8", found.of(), found.skipped["transformer"]))
    read = load_recipe(yaml.safe_load(text))
    assert not any(entry.axis == "allocate" for entry in read.entries)  # formats are chosen now
    numbers = {}
    for rule in read.rules:
        for layer in rule.on.split(" | "):
            numbers[layer] = "skip" if rule.skip else rule.weight and f"{rule.weight.format}/{rule.weight.granularity}"
    assert {layer: numbers[layer] for layer in found.of()} == found.of() and numbers["blocks.0.to_q"] == "skip"
    assert {str(rule.weight.range["name"]) for rule in read.rules if rule.weight} == {"mse"}  # pyright: ignore[reportArgumentType]


def bits_of(plan: StepPlan) -> tuple[int, ...]:
    """Bits of all layers."""
    (group,) = plan.groups
    return group.bits


def brute(grams: np.ndarray, choices: list[int], budget: float) -> float:
    """The least damage of all plans."""
    plans = itertools.product(range(len(choices)), repeat=grams.shape[1])
    return min(together(grams, one) for one in plans if sum(choices[pick] for pick in one) <= budget)


@pytest.mark.parametrize("method", ["milp", "greedy"])
def test_bits_go_to_the_steps_that_hold_the_damage(method: str) -> None:
    plan = allocate_steps(made(), 6.0, method=method)
    # steps 1 and 4 do almost all of the damage: 8 bits each; the others share what is left, 20 bits of the 36
    assert bits_of(plan) == (5, 8, 5, 5, 8, 5) and plan.mean == 6.0 and plan.part == "input"
    assert plan.damage == pytest.approx(4 * 64 + 100 + 50) and plan.uniform == (6, pytest.approx(16 * 154))
    recipe = with_steps("minmax-w6a6", plan.entries(made()))
    assert recipe.defaults.input is not None and recipe.defaults.input.format == "uint6"
    assert next(entry.stage for entry in recipe.entries if entry.name == "step_bits").inputs == bits_of(plan)
    assert load_recipe(yaml.safe_load(recipe_text(recipe))).digest() == recipe.digest()


@pytest.mark.parametrize("method", ["milp", "greedy"])
@pytest.mark.parametrize("seed", range(8))
def test_plans_are_the_best_of_all_or_near_it(method: str, seed: int) -> None:
    """Where errors of steps go together as much as those of weights do."""
    table, steps, generator = made(), 5, np.random.default_rng(seed)
    sizes, near = generator.lognormal(0, 2, steps), generator.uniform(0.3, 0.95)
    cosines = np.array([[near ** abs(one - other) for other in range(steps)] for one in range(steps)])
    choices = [4, 5, 6, 7, 8]
    rows = [
        Damage("transformer", "*", "weight", f"int{bits}/channel", "gradient", 4.0**-bits * size, 0.0, 0.0, (step, step))
        for bits in (4, 5, 6, 8)
        for step, size in enumerate(sizes)
    ]
    times, key = {"transformer": table.timesteps["transformer"][:steps]}, ("transformer", "weight", "gradient")
    table = replace(table, rows=(*(row for row in table.rows if row.layer != "*"), *rows), timesteps=times, together={key: cosines})  # type: ignore[dict-item]
    plan = allocate_steps(table, 5.6, part="weight", method=method)
    grams = cosines * np.array([4.0**-bits * np.sqrt(np.outer(sizes, sizes)) for bits in choices])
    assert plan.damage == pytest.approx(together(grams, [choices.index(one) for one in bits_of(plan)]))
    best = brute(grams, choices, 5.6 * steps)
    assert best * (1 - 1e-9) <= plan.damage <= 1.03 * best and plan.mean <= 5.6 and plan.damage <= plan.uniform[1]


def test_steps_whose_errors_point_the_same_way_do_more_together() -> None:
    grams = np.array([[[1.0, 0.9], [0.9, 1.0]], [[4.0, 3.6], [3.6, 4.0]]])
    assert together(grams, [0, 0]) == pytest.approx(3.8) and together(grams, [1, 1]) == pytest.approx(15.2)
    assert together(grams, [0, 1]) == pytest.approx(5.0)  # errors of different bits are independent


def test_cosines_are_saved_and_checked(tmp_path: Path) -> None:
    cosines = [[round(0.5 ** abs(one - other), 3) for other in range(6)] for one in range(6)]
    table = replace(made(), together={("transformer", "weight", "gradient"): cosines})
    file = table.save(tmp_path / "sensitivity.json")
    assert load_table(file).together == table.together
    data = json.loads(file.read_text())
    for wrong in ([["transformer", "weight", "gradient", cosines[:5]]], [["transformer", "bias", "gradient", cosines]]):
        file.write_text(json.dumps(data | {"together": wrong}))
        with pytest.raises(CheckpointError, match="'together' of"):
            load_table(file)
    file.write_text(json.dumps({key: value for key, value in data.items() if key != "together"}))  # of an earlier version
    assert load_table(file).together == {}


def test_steps_of_the_second_expert_are_numbered_through_the_whole_sampler() -> None:
    table = replace(made("transformer", "transformer_2"))
    late = {"transformer": (900.0, 800.0, 700.0, 600.0, 500.0, 400.0), "transformer_2": (350.0, 300.0, 250.0, 200.0, 150.0, 100.0)}
    table = replace(table, timesteps=late)
    assert allocate_steps(table, 6.0, "transformer_2").entries(table) == [{"inputs": [6] * 6 + [5, 8, 5, 5, 8, 5]}]


def test_equal_steps_keep_one_number_of_bits() -> None:
    table = made()
    flat = tuple(replace(row, damage=4.0 ** (8 - int(row.format[3]))) if row.part == "input" else row for row in table.rows)
    plan = allocate_steps(replace(table, rows=flat), 6.0)
    assert bits_of(plan) == (6,) * 6 and plan.damage == plan.uniform[1]


def test_what_has_no_bits_to_divide_is_said() -> None:
    with pytest.raises(RecipeError, match="leaves inputs float"):
        with_steps("w4a16", allocate_steps(made(), 6.0).entries(made()))
    with pytest.raises(RecipeError, match="stores weights as int4, and a step is to read 8 bits"):
        with_steps("minmax-w4a8", [{"weights": [8, 4]}])
    with pytest.raises(RecipeError, match="out of reach: inputs were measured at single steps with 4, 5, 6, 7, 8 bits"):
        allocate_steps(made(), 3.0)
    with pytest.raises(RecipeError, match="holds no damages of weights at single steps"):
        allocate_steps(made(), 6.0, part="weight")
    with pytest.raises(RecipeError, match="did you mean 'greedy'"):
        allocate_steps(made(), 6.0, method="gredy")
