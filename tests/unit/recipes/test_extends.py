"""Recipes that extend others: merging, lists by number, and what goes wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from reelquant._errors import RecipeError
from reelquant.engine.components import assign
from reelquant.recipes.recipe import load_recipe
from tests.tiny.configs import TINY

PARENT = """
name: parent
paper: "arXiv:1"
defaults:
  weight: {format: int8, granularity: channel}
  input: {format: uint8, dynamic: true}
rules:
  - {on: blocks.0, skip: true}
  - {on: blocks.1, weight: {format: int4}}
steps:
  - {solve: nearest}
"""


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(text)
    return file


def test_mappings_merge_key_by_key_and_lists_are_replaced(tmp_path: Path) -> None:
    write(tmp_path, "parent", PARENT)
    child = write(
        tmp_path, "child", "extends: parent.yaml\nname: child\ndefaults: {weight: {format: int6}}\nrules: [{on: blocks.2, skip: true}]\n"
    )
    recipe = load_recipe(child)
    assert (recipe.name, recipe.paper) == ("child", "arXiv:1")
    assert (recipe.defaults.weight.format, recipe.defaults.weight.granularity) == ("int6", "channel")
    assert [rule.on for rule in recipe.rules] == ["blocks.2"] and len(recipe.steps) == 1


def test_a_mapping_over_a_list_changes_items_by_number(tmp_path: Path) -> None:
    write(tmp_path, "parent", PARENT)
    child = write(tmp_path, "child", "extends: parent.yaml\nname: child\nrules: {1: {weight: {format: int6}}}\n")
    rules = load_recipe(child).rules
    assert [rule.on for rule in rules] == ["blocks.0", "blocks.1"] and rules[1].weight.format == "int6"
    wrong = write(tmp_path, "wrong", "extends: parent.yaml\nname: child\nrules: {2: {skip: true}}\n")
    with pytest.raises(RecipeError, match=r"'2' is not one of the 2 items \(0 to 1\)"):
        load_recipe(wrong)


def test_grandparents_and_recipes_of_the_library_are_followed(tmp_path: Path) -> None:
    write(tmp_path, "one", "extends: qvd-w8a8\nname: one\ncalibrate: {prompts: 3}\n")
    two = load_recipe(write(tmp_path, "two", "extends: one.yaml\nname: two\n"))
    assert two.calibrate.prompts == 3 and two.calibrate.ranges == "unseen" and two.paper == "arXiv:2407.11585"


def test_the_digest_is_that_of_the_merged_recipe(tmp_path: Path) -> None:
    parent = write(tmp_path, "parent", PARENT)
    child = write(tmp_path, "child", "extends: parent.yaml\n")
    assert load_recipe(child).digest() == load_recipe(parent).digest()
    assert load_recipe(load_recipe(child)) == load_recipe(child)  # what a checkpoint stores needs no parent


def test_circles_and_missing_parents_are_errors(tmp_path: Path) -> None:
    one = write(tmp_path, "one", "extends: two.yaml\nname: one\n")
    write(tmp_path, "two", "extends: one.yaml\nname: two\n")
    with pytest.raises(RecipeError, match=r"extend each other in a circle: .*one.yaml -> .*two.yaml -> .*one.yaml"):
        load_recipe(one)
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(write(tmp_path, "lost", "extends: nowhere.yaml\nname: lost\n"))
    with pytest.raises(RecipeError, match="'extends' names one recipe or file"):
        load_recipe({"extends": ["a", "b"], "name": "many"})


def test_a_mapping_that_extends_a_recipe_is_a_recipe_and_not_a_table_of_components() -> None:
    pipe = SimpleNamespace(components={"transformer": TINY["WanTransformer3DModel"]()})
    recipes = assign(pipe, {"extends": "w8a16", "name": "mine"})
    assert {name: recipe.name for name, recipe in recipes.items()} == {"transformer": "mine"}
