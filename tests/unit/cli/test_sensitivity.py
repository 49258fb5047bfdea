"""``reelquant sensitivity`` and ``recipes --for``: what they print and write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from reelquant.allocate import Damage
from reelquant.cli import app
from reelquant.cli.sensitivity import tables
from reelquant.recipes.recipe import load_recipe
from tests.unit.allocate.test_table import made
from tests.unit.cli.test_layout import WIDTHS, check


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made().edited(["blocks.0"]).save(tmp_path / "map" / "sensitivity.json")
    return tmp_path / "map"


def test_a_table_is_read_and_a_budget_divided_into_a_recipe(folder: Path) -> None:
    result = invoke("sensitivity", folder, "--bits", "4.5")
    said = " ".join(result.output.split())
    assert result.exit_code == 0, result.output
    assert "bits a weight with scales" in said and "1 layers, as the table says" in said and "dB worse" in said
    recipe = load_recipe(folder / "recipe.yaml")
    assert f"reelquant quantize made -r {folder}/recipe.yaml -o out" in said
    assert recipe.name == "w4a16-allocated" and any(rule.skip and rule.on == "blocks.0.to_q" for rule in recipe.rules)


def test_recipes_of_two_experts_are_used_by_one_command(tmp_path: Path) -> None:
    made("transformer", "transformer_2").save(tmp_path / "sensitivity.json")
    said = " ".join(invoke("sensitivity", tmp_path, "--bits", "4.5").output.split())
    names = " ".join(f"-r {name}={tmp_path}/recipe-{name}.yaml" for name in ("transformer", "transformer_2"))
    assert f"reelquant quantize made {names} -o out" in said


def test_what_is_asked_of_a_table_that_is_read_counts(folder: Path, tmp_path: Path) -> None:
    """Formats, layers that stay float and another folder for the recipe."""
    words = ("--formats", "int4/group-64,int8/channel", "--skip", "blocks.1", "-o", tmp_path / "other", "--bits", "5")
    result = invoke("sensitivity", folder, *words, "--json")
    found = json.loads(result.stdout)
    assert set(found["allocation"]["formats"]["transformer"].values()) == {"int4/group-64", "int8/channel"}
    assert found["allocation"]["skipped"]["transformer"] == ["blocks.0.to_q", "blocks.1.to_q"]
    assert found["recipes"] == [str(tmp_path / "other" / "recipe.yaml")] and Path(found["recipes"][0]).is_file()
    assert [file.name for file in folder.iterdir()] == ["sensitivity.json"]


def test_both_budgets_make_one_recipe_and_json_is_one_document(folder: Path) -> None:
    result = invoke("sensitivity", folder, "-r", "minmax-w6a6", "--bits", "4.5", "--step-bits", "6", "--json")
    data = json.loads(result.stdout)
    assert data["steps"][0]["groups"][0]["bits"] == [5, 8, 5, 5, 8, 5]
    assert data["allocation"]["bits"] <= 4.5 and data["table"]["version"] == 1
    written = yaml.safe_load(Path(data["recipes"][0]).read_text())
    assert written["step_bits"] == {"inputs": [5, 8, 5, 5, 8, 5]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--bits", "2"), "is out of reach"),
        (("--bits", "4.5", "--method", "mlip"), "did you mean 'milp'"),
        (("--steps", "3"), "measured already, and is only read, so --steps would change nothing"),
        (("--clips", "8", "--by-step"), "--clips, --by-step would change nothing"),
        (("--skip", "nowhere", "--bits", "4.5"), "nowhere"),
        (("--formats", "int7/channel", "--bits", "4.5"), "was not measured with 'int7/channel'"),
        (("--step-bits", "6"), "leaves inputs float"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(folder: Path, words: tuple[str, ...], message: str) -> None:
    result = invoke("sensitivity", folder, *words)
    assert result.exit_code != 0 and message in " ".join((result.output + str(result.exception or "")).replace("│", " ").split())
    assert [file.name for file in folder.iterdir()] == ["sensitivity.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tiny-dit", "--bits", "4.5"), "the map and the recipe need a folder to lie in: give --output"),
        (("tiny-dit", "-o", "{}/map", "--bits", "2"), "--bits 2 is less than the codes of int3/group-64"),
        (("tiny-dit", "-o", "{}/map", "--bits", "3", "--formats", "int4/channel,int8/channel"), "4 bits and more with scales"),
        (("tiny-dit", "-o", "{}/map", "--size", "much"), "'much' is not an amount of memory"),
        (("tiny-dit", "-o", "{}/map", "--bits", "4.5", "--method", "mlip"), "did you mean 'milp'"),
        (("{}", "--bits", "4.5"), "holds no pipeline to measure (model_index.json) and no map to read (sensitivity.json)"),
        (("{}/nothing", "--bits", "4.5"), "no pipeline at"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    def measured(*_: Any, **__: Any) -> Any:
        raise AssertionError("something is measured")

    monkeypatch.setattr("reelquant.api.sensitivity", measured)
    result = invoke("sensitivity", *(word.format(tmp_path) for word in words))
    said = " ".join((result.output + str(result.exception or "")).replace("│", " ").split())
    assert result.exit_code != 0 and message in said, said


def test_a_budget_that_the_recipe_has_no_bits_for_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    for words, message in ((("--step-bits", "6"), "leaves inputs float"), (("--step-weight-bits", "6"), "stores weights as int4")):
        result = invoke("sensitivity", "tiny-dit", "-o", tmp_path / "map", *words)
        said = " ".join((result.output + str(result.exception or "")).replace("│", " ").split())
        assert result.exit_code != 0 and message in said and not (tmp_path / "map").exists()


@pytest.mark.parametrize("width", WIDTHS)
def test_every_table_fits(width: int) -> None:
    from reelquant.allocate import allocate, allocate_steps

    table = made()
    for part in tables(table, allocate(table, bits=4.5), [allocate_steps(table, 6.0)], None):
        check(part, width)


def test_weights_are_read_in_bits_of_a_budget(tmp_path: Path) -> None:
    table = made()
    rows = [
        Damage("transformer", "*", "weight", f"int{bits}/channel", "gradient", 4.0**-bits * 10**step, 0.0, 0.0, (step, step))
        for bits in (4, 6, 8)
        for step in range(6)
    ]
    replace(table, rows=(*table.rows, *rows)).save(tmp_path / "sensitivity.json")
    result = invoke("sensitivity", tmp_path, "-r", "minmax-w8a8", "--step-bits", "6", "--step-weight-bits", "5", "--json")
    plans = {one["part"]: one["groups"][0]["bits"] for one in json.loads(result.stdout)["steps"]}
    assert set(plans) == {"input", "weight"} and sum(plans["weight"]) <= 30 and plans["weight"] == sorted(plans["weight"])
    written = load_recipe(tmp_path / "recipe.yaml")
    stage = next(entry.stage for entry in written.entries if entry.name == "step_bits")
    assert (list(stage.inputs), list(stage.weights)) == (plans["input"], plans["weight"])  # type: ignore[attr-defined]


def test_roles_are_told_by_the_models_own_table(folder: Path) -> None:
    data = json.loads(invoke("recipes", "--for", folder, "--json").stdout)
    assert data["own"] and data["roles"][0]["role"] == "main" and data["roles"][0]["per_weight"] == pytest.approx(1.0)
    assert "measured on this model by gradient" in data["because"]


def test_roles_of_a_model_without_a_table_come_with_what_was_measured_of_others() -> None:
    result = invoke("recipes", "--for", "tiny-dit", "--json")
    data = json.loads(result.stdout)
    roles = {one["role"]: one for one in data["roles"]}
    assert not data["own"] and roles["prompt"]["layers"] == 14
    assert set(roles["main"]["trained"]) == {"tiny-dit", "tiny-unet", "tiny-ltx"} and len(roles["main"]["random"]) > 20
    assert all(one["always"] == (min(one["trained"].values()) > 1) for one in roles.values() if len(one["trained"]) == 3)
    assert roles["entry"]["names"] and "what their wiring does with an error" in data["because"]
    shown = " ".join(invoke("recipes", "--for", "tiny-dit").output.split())
    always = [one["role"] for one in roles.values() if one["always"]]
    assert "sensitive in every trained pipeline: " + (always[0] if always else "no role") in shown
