from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from reelquant._errors import RecipeError
from reelquant._remarks import remarks
from reelquant.recipes.recipe import Recipe, load_recipe, names

BASE: dict[str, Any] = {"name": "mine", "defaults": {"weight": {"format": "int8", "granularity": "channel"}, "input": {"format": "uint8"}}}


def recipe(**changes: Any) -> dict[str, Any]:
    return BASE | changes


@pytest.mark.parametrize("name", names())
def test_library_recipes_are_valid_and_called_like_their_file(name: str) -> None:
    found = load_recipe(name)
    assert found.name == name and found.summary
    assert load_recipe(found) == found and load_recipe(found).digest() == found.digest()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (recipe(rulez=[]), "unknown key 'rulez'; did you mean 'rules'?"),
    "unknown key in a rule": (recipe(rules=[{"on": "a", "wieght": None}]), r"unknown key 'rules.0.wieght'; did you mean 'weight'?"),
    "unknown key in a tensor": (
        recipe(defaults={"weight": {"format": "int8", "granulariti": "channel"}}),
        "unknown key 'defaults.weight.granulariti'; did you mean 'granularity'?",
    ),
    "unknown key in calibrate": (recipe(calibrate={"prompt": 3}), "unknown key 'calibrate.prompt'; did you mean 'prompts'?"),
    "unknown format": (recipe(defaults={"weight": {"format": "int9"}}), "unknown number format 'int9'; did you mean 'int"),
    "unknown granularity": (
        recipe(defaults={"weight": {"format": "int8", "granularity": "chanel"}}),
        "unknown granularity 'chanel'; did you mean 'channel'?",
    ),
    "a group without a size": (
        recipe(defaults={"weight": {"format": "int8", "granularity": "group"}}),
        "'group' needs a size, as in 'group-64'",
    ),
    "scales of eight bits without groups": (
        recipe(defaults={"weight": {"format": "int4", "granularity": "channel", "scale": "e8m0"}}),
        "scale: e8m0 belongs to groups, as in granularity: group-32; got granularity 'channel'",
    ),
    "scales of eight bits beside zero points": (
        recipe(defaults={"weight": {"format": "uint4", "granularity": "group-32", "scale": "e4m3"}}),
        "uint4 has zero points, and scale: e4m3 has none",
    ),
    "unknown range": (recipe(defaults={"weight": {"format": "int8", "range": "minmx"}}), "unknown range 'minmx'; did you mean 'minmax'?"),
    "unknown range parameter": (
        recipe(defaults={"weight": {"format": "int8", "range": {"name": "mse", "q": 2}}}),
        "range 'mse' has no parameter 'q'",
    ),
    "unknown criterion": (
        recipe(defaults={"weight": {"format": "int8", "range": {"name": "criterion", "score": "tdscor"}}}),
        "unknown criterion 'tdscor'; did you mean 'tdscore'?",
    ),
    "a word for a number": (
        recipe(defaults={"weight": {"format": "int8", "range": {"name": "mse", "p": "two"}}}),
        "p of range 'mse'.*'two'",
    ),
    "unknown transform": (recipe(steps=[{"transform": "shfit"}]), "steps.0: .*unknown transform 'shfit'; did you mean 'shift'?"),
    "unknown solver": (recipe(steps=[{"solve": "gtpq"}]), "unknown solver 'gtpq'; did you mean 'gptq'?"),
    "unknown parameter": (
        recipe(steps=[{"transform": "shift", "centre": "mid"}]),
        "transform 'shift' has no parameter 'centre'; did you mean 'center'?",
    ),
    "a parameter where there is none": (
        recipe(steps=[{"solve": "nearest", "damping": 0.1}]),
        "solver 'nearest' has no parameter 'damping'; it has none",
    ),
    "a value out of bounds": (recipe(steps=[{"transform": "range_integrate", "power": [0.5, 1.5]}]), r"power lies in \[0, 1\], got 1.5"),
    "a word for a power": (
        recipe(steps=[{"transform": "range_integrate", "power": "high"}]),
        "power of transform 'range_integrate'.*'high'",
    ),
    "nothing to choose from": (
        recipe(steps=[{"transform": "range_integrate", "power": []}]),
        "an empty list leaves nothing to choose from",
    ),
    "two mechanisms in a step": (recipe(steps=[{"transform": "shift", "solve": "gptq"}]), "exactly one mechanism"),
    "no mechanism in a step": (recipe(steps=[{"on": "role:main"}]), "exactly one mechanism"),
    "two solvers for the same layers": (
        recipe(steps=[{"solve": "gptq"}, {"solve": "nearest"}]),
        "two solve steps, 'gptq' and 'nearest', act on the layers 'role:main .*': keep one",
    ),
    "two reuses": (
        recipe(steps=[{"reuse": "blocks"}, {"reuse": "blocks", "every": 3}]),
        "two reuse steps, 'blocks' and 'blocks', act on the whole denoiser: keep one",
    ),
    "a key and a step that say the same": (
        recipe(steps=[{"policy": "protect_steps", "steps": [0]}], protect_steps=[-1]),
        "two protect_steps steps, 'protect_steps' and 'protect_steps', act on the whole denoiser: keep one",
    ),
    "no prompts": (recipe(calibrate={"prompts": 0}), "calibrate.prompts: .*greater than or equal to 1"),
    "no steps": (recipe(calibrate={"steps": 0}), "calibrate.steps: .*greater than or equal to 1"),
    "unknown slots": (recipe(defaults={"weight": {"format": "int8", "slots": "some"}}), "defaults.weight.slots: .*'shared' or 'per_step'"),
    "no weight": ({"name": "mine", "defaults": {}}, "defaults.weight: Field required"),
    "a transform without data": (recipe(calibrate=None, steps=[{"transform": "scale"}]), "'scale' needs statistics"),
    "a rotation that pays by what data show": (recipe(calibrate=None, steps=[{"transform": "rotate"}]), "'rotate' needs statistics"),
    "a solver without data": (recipe(calibrate=None, steps=[{"solve": "gptq"}]), "'gptq' needs statistics"),
    "a table without data": (recipe(calibrate=None, temporal="table"), "'temporal: table' needs statistics"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_place_and_what_would_work(case: str) -> None:
    data, message = BAD[case]
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")) as caught:
        load_recipe(data)
    assert str(caught.value).startswith("mine: ") and "\n" not in str(caught.value)


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe is called 'qvd-w8a9'; did you mean 'qvd-w8a8'\?"):
        load_recipe("qvd-w8a9")
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    for text, message in (("a: [1", "not valid YAML"), ("- a\n- b\n", "holds no recipe: .* got list"), ("", "got NoneType")):
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        with pytest.raises(RecipeError, match=message) as caught:
            load_recipe(file)
        assert "mine.yaml" in str(caught.value)


def test_on_is_a_word_and_true_is_a_boolean(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\ndefaults:\n  weight: {format: int8}\n  input: {format: uint8, dynamic: true}\n"
        "rules:\n  - {on: blocks.0, keep: true, because: no}\nsteps:\n  - {solve: nearest, on: off}\n"
    )
    found = load_recipe(file)
    assert found.rules[0].on == "blocks.0" and found.rules[0].skip is True and found.rules[0].because == "no"
    assert found.steps[0].on == "off" and found.defaults.input.dynamic is True


def test_overrides_reach_mappings_and_lists() -> None:
    data = recipe(rules=[{"on": "a"}, {"on": "b"}], steps=[{"transform": "range_integrate", "power": [0.0, 1.0]}])
    changes = {"calibrate.steps": 7, "defaults.weight.format": "int4", "rules.1.keep": True, "steps.0.power": 0.5, "search.scope": "family"}
    for source in (data, load_recipe(data)):  # a recipe that was read already can be changed just as well
        found = load_recipe(source, changes)
        assert found.calibrate.steps == 7 and found.calibrate.prompts == 16
        assert found.defaults.weight.format == "int4" and found.defaults.weight.granularity == "channel"
        assert found.rules[1].skip is True and found.rules[0].skip is None
        assert found.entries[0].options == ({"power": 0.5},) and found.search.scope == "family"
    assert data["steps"][0]["power"] == [0.0, 1.0]  # the source is left alone


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("rules.2.keep", r"cannot set 'rules.2.keep': '2' is not one of the 1 items \(0 to 0\)"),
        ("rules.first.keep", "'first' is not one of the 1 items"),
        ("steps.0.on", "'0' is not there: the list is empty"),
        ("name.first", "cannot set 'name.first': 'name' is 'mine', not a mapping"),
        ("defaults.weight.formt", r"unknown key 'defaults.weight.formt'; did you mean 'format'\?"),
    ],
)
def test_bad_overrides_say_why(key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe(rules=[{"on": "a"}], steps=[]), {key: True})


def test_lists_are_choices_and_multiply() -> None:
    entry = load_recipe(recipe(steps=[{"transform": "range_integrate", "power": [0.0, 0.5, 1.0], "cap": [0.5, 1.0]}])).entries[0]
    assert len(entry.alternatives) == 6 and {"power": 0.5, "cap": 1.0} in entry.options
    assert load_recipe(recipe(steps=[{"solve": "gptq"}])).entries[0].options == ({},)


def test_a_recipe_is_immutable_and_its_digest_follows_its_content() -> None:
    one, two = load_recipe(recipe()), load_recipe(recipe(), {"calibrate.seed": 1})
    assert one.digest() == load_recipe(recipe()).digest() != two.digest()
    assert re.fullmatch("[0-9a-f]{16}", one.digest())
    with pytest.raises(ValueError, match="frozen"):
        one.name = "other"  # type: ignore[misc]
    assert load_recipe(recipe(), {"summary": "said otherwise", "ours": "more"}).digest() == one.digest()
    assert isinstance(one, Recipe) and not one.data_free and load_recipe("w4a16").data_free


def test_runs_of_the_sampler_are_small_enough_to_compare() -> None:
    assert [load_recipe(recipe(calibrate={"prompts": n})).calibrate.batch for n in (1, 3, 4, 8, 16, 64)] == [1, 1, 1, 2, 4, 4]


def test_a_key_that_is_not_used_leaves_the_digest_of_earlier_versions_alone() -> None:
    assert load_recipe("w4a16").digest() == "f27dbfb2c867bcd7"
    grouped = recipe(defaults={"weight": {"format": "int4", "granularity": "group-32", "scale": "e8m0"}})
    found = load_recipe(grouped)
    assert found.model_dump()["defaults"]["weight"]["scale"] == "e8m0" and load_recipe(found) == found
    assert found.digest() != load_recipe(grouped, {"defaults.weight.scale": "float"}).digest()


WEIGHTS_ALONE: dict[str, Any] = {"name": "mine", "defaults": {"weight": {"format": "int8", "granularity": "channel"}}}


def test_a_recipe_of_weights_alone_does_not_calibrate(caplog: pytest.LogCaptureFixture) -> None:
    """Calibration is the default of recipes; 54 s were sampled for nothing where a file did not say ``calibrate: null``."""
    mixed = {"on": "*.to_q", "weight": {"format": "int4", "granularity": "group-64"}, "input": None}
    plain: list[dict[str, Any]] = [{}, {"rules": [mixed]}, {"steps": [{"solve": "nearest"}]}, {"steps": [{"transform": "equalize"}]}]
    for changes in plain:
        assert load_recipe(WEIGHTS_ALONE | changes).data_free, changes
    assert load_recipe({"extends": "w8a16", "name": "mine"}).data_free
    assert not caplog.records
    with remarks() as told:
        found = load_recipe(WEIGHTS_ALONE | {"calibrate": {"prompts": 4}})
    assert found.data_free and told == [
        "recipe 'mine' rounds weights alone and no step of it looks at data, so nothing is sampled; drop its 'calibrate'"
    ]
    assert load_recipe(found) == found and load_recipe(found).digest() == found.digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"defaults": WEIGHTS_ALONE["defaults"] | {"input": {"format": "int8"}}},
        {"rules": [{"on": "*.to_q", "input": {"format": "int8", "granularity": "token", "dynamic": True}}]},
        {"steps": [{"solve": "gptq"}]},
        {"steps": [{"branch": "lowrank", "rank": [4, 8]}]},
        {"temporal": "table"},
    ],
    ids=["inputs", "inputs of a rule", "a solver that looks at data", "a choice", "a table of steps"],
)
def test_a_recipe_that_samples_for_a_reason_still_does(changes: dict[str, Any]) -> None:
    assert not load_recipe(WEIGHTS_ALONE | changes).data_free
