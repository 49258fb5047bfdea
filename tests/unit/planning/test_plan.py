"""Which recipes fit, by folders alone: budgets, errors, commands, and sizes beside what is then written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import yaml
from typer.testing import CliRunner

import reelquant
from reelquant._errors import RecipeError, UnsupportedError
from reelquant.allocate import Damage, SensitivityTable
from reelquant.cli import app
from reelquant.cli.plan import _written, tables
from reelquant.damage.scene import layers_of
from reelquant.discover.components import TIMED, Kind
from reelquant.engine.sizes import layers_bytes, quantized_bytes
from reelquant.models.sampling import sample
from reelquant.nn import quantized_layers
from reelquant.planning import Planned, Way, quality
from reelquant.planning.candidates import FLOAT, Bench, Candidate, tried
from reelquant.planning.formats import MEASURED, Formats
from reelquant.planning.memory import Footprint, peak
from reelquant.planning.plan import Survey, files_of, recipe_yaml, survey
from reelquant.recipes.recipe import load_recipe, names
from reelquant.reuse import installed_reuse
from reelquant.reuse.history import History
from reelquant.streaming import parse_bytes
from tests.unit.cli.test_layout import check

BUNDLED = {"tiny-dit": None, "tiny-unet": ["float", "w8a16"]}  # with the usual recipes, and with two
CARD = "cuda:7"  # a device that no machine of a test has
ROOM = "1GB"


@pytest.fixture(scope="module")
def surveys() -> dict[str, Survey]:
    """Of the bundled pipelines, for a card that is elsewhere."""
    return {model: survey(model, CARD, recipes=some) for model, some in BUNDLED.items()}


@pytest.fixture(scope="module")
def plans(surveys: dict[str, Survey]) -> dict[str, Planned]:
    """With room for everything."""
    return {model: one.within(10**9) for model, one in surveys.items()}


def tight(plan: Planned, share: float) -> int:
    """A budget between the smallest way and the float pipeline."""
    least = min(way.peak for way in plan.others)
    return round(least + share * (plan.as_it_is.peak - least))


def test_what_is_tried_for_every_kind_of_component_is_in_the_library() -> None:
    """A recipe that is renamed, or a new kind of component, is noticed here and not by a user."""
    for kind in ("denoiser", *(one for one in get_args(Kind) if one not in TIMED)):
        first, *others = tried(kind)
        assert first == FLOAT
        assert others and set(others) <= set(names())


@pytest.mark.parametrize("model", BUNDLED)
def test_a_plan_counts_every_component_and_reads_no_weight(plans: dict[str, Planned], model: str) -> None:
    plan = plans[model]
    assert {one["kind"] for one in plan.components.values()} == {"text encoder", "denoiser", "vae"}
    assert plan.best == plan.as_it_is and plan.best.words == "everything as it is"
    weights = sum(one["bytes"] for one in plan.components.values())
    most = max(one["running"] for one in plan.components.values())
    assert most > 0 and plan.best.peak >= weights + most
    assert plan.bands == {"memory": None, "speed": None}  # no prediction for a card was ever held against one
    assert plan.clip[1:] == (64, 64) and plan.clip[0] in (8, 13)
    assert all(way.speed == "not measured here" for way in plan.others if way.recipes != plan.best.recipes)


def test_less_room_means_more_quantized(surveys: dict[str, Survey], plans: dict[str, Planned]) -> None:
    plan = plans["tiny-unet"]
    some = surveys["tiny-unet"].within(tight(plan, 0.4))
    assert some.best.peak <= some.budget < plan.best.peak
    assert some.best.recipes != plan.best.recipes or some.best.offload != "none"
    assert all(way.peak <= some.budget for way in some.others)
    assert some.as_it_is.peak > some.budget


@pytest.mark.parametrize("model", BUNDLED)
def test_where_nothing_fits_the_smallest_budget_is_named_and_does(surveys: dict[str, Survey], model: str) -> None:
    with pytest.raises(RecipeError, match=rf"is too little for '{model}' at .*x64x64: the smallest way, .* allow --max-memory") as raised:
        surveys[model].within(100_000)
    named = str(raised.value).partition("allow --max-memory ")[2].partition(",")[0]
    assert surveys[model].within(parse_bytes(named)).best.peak <= parse_bytes(named)


def test_longer_and_larger_clips_take_more(plans: dict[str, Planned]) -> None:
    longer = reelquant.plan("tiny-dit", max_memory=ROOM, device=CARD, recipes=["float"], num_frames=25, height=96, width=128)
    assert longer.clip == (25, 96, 128)
    before = plans["tiny-dit"].components
    assert longer.components["vae"]["running"] > 2 * before["vae"]["running"]
    assert longer.components["transformer"]["running"] > before["transformer"]["running"]
    assert longer.components["text_encoder"] == before["text_encoder"]


def test_without_a_map_formats_are_chosen_while_quantizing(surveys: dict[str, Survey]) -> None:
    bench = surveys["tiny-dit"].bench  # nobody gives it a map
    made = bench.allocated(5.5)
    step = next(entry.stage for entry in made.own["transformer"].entries if "choose_specs" in entry.stage.hooks())
    assert made.chosen_later and step.bits == 5.5 and made.own["transformer"].name == "planned-w5.5a8"
    plan = made.plans["transformer"]
    weights = sum(row.bytes_before / 4 for row in plan.quantized)
    assert layers_bytes(plan) == pytest.approx(5.5 / 8 * weights, rel=0.05)
    greedy = Formats(method="greedy").recipes(4.0, ["transformer"])["transformer"]
    assert [type(entry.stage).__name__ for entry in greedy.entries][-1] == "Greedy"
    with pytest.raises(RecipeError, match=r"--bits lies between 3\.26 and 8\.00 bits"):
        Formats().recipes(2.0, ["transformer"])
    with pytest.raises(RecipeError, match="unknown method 'mlip' of allocation; did you mean 'milp'"):
        reelquant.plan("tiny-dit", max_memory=ROOM, allocate="mlip")


def test_bits_out_of_reach_are_refused_before_a_map_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: Any, **__: Any) -> Any:
        raise AssertionError("a map is measured")

    monkeypatch.setattr("reelquant.api.sensing.sensitivity", measured)
    for place in (None, tmp_path / "no-map-yet"):
        for bits in (1.0, 9.0):
            with pytest.raises(RecipeError, match=rf"--bits lies between 3\.26 and 8\.00 bits .* got {bits:g}"):
                reelquant.plan("tiny-dit", max_memory=ROOM, bits=bits, map=place)


def test_a_budget_without_a_unit_is_told_to_be_bytes(surveys: dict[str, Survey]) -> None:
    with pytest.raises(RecipeError, match=r"--max-memory 12 bytes \(a number without a unit is bytes\) is too little"):
        surveys["tiny-dit"].within(parse_bytes("12"))


@pytest.fixture(scope="module")
def table(surveys: dict[str, Survey]) -> SensitivityTable:
    """A map of tiny-dit with made-up damages."""
    layers = [one for one in layers_of("transformer", surveys["tiny-dit"].bench.parts["transformer"].map) if one.role not in ENDS]
    rows = [
        Damage("transformer", layer.name, "weight", fmt, "gradient", *3 * ((1 + number % 7) * layer.weights * 4.0**-bits,))
        for number, layer in enumerate(layers)
        for fmt, bits in zip(MEASURED, (3, 4, 6, 8), strict=True)
    ]
    return SensitivityTable("tiny-dit", "w4a16", tuple(layers), tuple(rows))


ENDS = ("entry", "exit")


def test_a_map_gives_formats_by_layer_and_has_the_last_word(table: SensitivityTable, tmp_path: Path) -> None:
    edited = table.edited(["blocks.0.attn1.to_q"], {"blocks.1.*": "int8/channel"})
    edited.save(tmp_path / "map" / "sensitivity.json")
    file = tmp_path / "recipe.yaml"
    words = ["plan", "tiny-dit", "--max-memory", ROOM, "--device", CARD, "--bits", "5.5", "--map", str(tmp_path / "map"), "-o", str(file)]
    told = json.loads(CliRunner().invoke(app, [*words, "--allocate", "greedy", "--json"]).stdout)
    assert told["written"] == [str(file)] and f"-r {file}" in told["best"]["command"]
    assert "exists" in CliRunner().invoke(app, words).stderr
    recipe = load_recipe(file)
    assert recipe.name == "planned-w5.5a8" and not any("choose_specs" in entry.stage.hooks() for entry in recipe.entries)
    rows = reelquant.plan(reelquant.open_pipeline("tiny-dit"), recipe).layers
    assert rows["blocks.0.attn1.to_q"].skipped == "the allocation leaves it float"
    assert all(row.specs is not None and row.specs.weight.format.bits == 8 for name, row in rows.items() if name.startswith("blocks.1."))
    mine = [rows[layer.name] for layer in table.layers if rows[layer.name].skipped is None]
    bits = 8 * sum(row.bytes_after - row.bytes_beside for row in mine) / sum(math.prod(row.layer.shape) for row in mine)
    assert 0.99 * 5.5 <= bits <= 5.5


@pytest.mark.parametrize("bits", [3.5, 6.5])
def test_what_is_left_of_the_memory_is_divided_among_the_layers(surveys: dict[str, Survey], table: SensitivityTable, bits: float) -> None:
    plain = surveys["tiny-dit"]
    made = replace(plain, bench=Bench(plain.bench.parts, plain.seen, CARD, plain.bench.seen_at, lambda parts: Formats(table)))
    _, budget = made._smallest(made.bench.allocated(bits), "none")
    chosen, mode = made._by_bits(budget)[0]
    found = made._way(chosen, mode)
    assert mode == "none" and 0.99 * budget <= found.peak <= budget
    assert float(found.recipes["transformer"].removeprefix("planned-w").removesuffix("a8")) == pytest.approx(bits, abs=0.02)
    assert list(found.own) == ["recipe.yaml"] and "-r transformer=recipe.yaml" in found.command


def test_a_map_of_another_model_is_refused(table: SensitivityTable) -> None:
    other = replace(table, layers=(replace(table.layers[0], shape=(3, 5)), *table.layers[1:]))
    with pytest.raises(RecipeError, match=r"of another model: layer '.*' of 'transformer' has a weight of \(3, 5\) there, and here it has"):
        reelquant.plan("tiny-dit", max_memory=ROOM, device=CARD, bits=4.5, map=other)


def test_a_map_is_measured_where_there_is_none_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REELQUANT_CACHE", str(tmp_path))
    how: dict[str, Any] = dict(max_memory=ROOM, device=CARD, bits=4.5, num_inference_steps=1, num_frames=5, height=32, width=32)
    first = reelquant.plan("tiny-dit", **how)
    assert "allocate" not in first.best.own["recipe.yaml"] and len([*tmp_path.glob("maps/*/sensitivity.json")]) == 1
    monkeypatch.setattr("reelquant.api.sensing.sensitivity", None)  # would fail if it were measured again
    assert reelquant.plan("tiny-dit", **how).best == first.best
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**6))
    assert "allocate: milp" in reelquant.plan("tiny-dit", **how | {"num_frames": 9}).best.own["recipe.yaml"]


def test_experts_with_formats_of_their_own_get_a_file_each(tmp_path: Path) -> None:
    one, other = load_recipe("w8a16"), load_recipe("w4a16")
    made = Candidate("denoisers", "planned", one, {}, {}, 0, own={"transformer": one, "transformer_2": other})
    files = files_of(made)
    assert files == {"transformer": "recipe-transformer.yaml", "transformer_2": "recipe-transformer_2.yaml"}
    assert set(files_of(replace(made, own={"transformer": one, "transformer_2": one})).values()) == {"recipe.yaml"}
    way = Way({}, "none", 0, 0, 1.0, "", "", own={file: recipe_yaml(made.own[name]) for name, file in files.items()})
    written = _written(way, tmp_path / "mine.yaml")
    assert {name: file.name for name, file in written.items()}["recipe-transformer_2.yaml"] == "mine-transformer_2.yaml"
    assert load_recipe(written["recipe-transformer_2.yaml"]).digest() == other.digest()


def test_commands_are_what_they_say(surveys: dict[str, Survey], plans: dict[str, Planned]) -> None:
    ways = {way.recipes["transformer"]: way for way in plans["tiny-dit"].others if way.offload == "none"}
    assert ways["qvd-w8a8"].command == "reelquant quantize tiny-dit -r qvd-w8a8 --dtype bfloat16 -o out"
    assert set(ways) <= {*names(), "float"}
    for way in plans["tiny-unet"].others:
        quantized = {name: recipe for name, recipe in way.recipes.items() if recipe != "float"}
        assert all(recipe in way.command for recipe in quantized.values())


def test_quality_is_told_where_it_was_measured(plans: dict[str, Planned]) -> None:
    for model, part in (("tiny-dit", "transformer"), ("tiny-unet", "unet")):
        told = {way.recipes[part]: way.quality for way in plans[model].others if part in way.recipes and way.recipes[part] != "float"}
        found = {name: quality.measured(model, name) for name in told}
        assert any(one is not None for one in found.values())
        assert told == {name: quality.NOT_MEASURED if one is None else str(one) for name, one in found.items()}
    assert quality.measured("tiny-dit", "a-recipe-without-clips") is None
    assert quality.measured("my-folder", "qvd-w8a8") is None


@pytest.mark.parametrize("model", BUNDLED)
def test_dry_runs_and_plans_say_the_size_of_the_folder(plans: dict[str, Planned], model: str, tmp_path: Path) -> None:
    told = json.loads(CliRunner().invoke(app, ["quantize", model, "-r", "w8a16", "--dry-run", "--json", "--dtype", "bfloat16"]).stdout)
    report = reelquant.quantize_folder(model, tmp_path / "out", "w8a16", dtype=torch.bfloat16)
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert told["estimate"]["result"] == pytest.approx(written, rel=0.05)
    assert told["bytes_after"] == pytest.approx(sum(row.bytes_after for row in report.layers), rel=0.05)
    way = next(way for way in plans[model].others if "w8a16" in way.command and way.offload == "none")
    assert way.size == pytest.approx(written, rel=0.05)


def test_a_recipe_by_layer_has_the_size_that_was_planned(table: SensitivityTable, tmp_path: Path) -> None:
    way = reelquant.plan("tiny-dit", max_memory=ROOM, device=CARD, bits=4.5, map=table).best
    # without data: static ranges and codes by GPTQ take as many bytes
    data = yaml.safe_load(way.own["recipe.yaml"]) | {"calibrate": None, "steps": []}
    data["defaults"]["input"] = {"format": "int8", "granularity": "token", "dynamic": True}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data))
    words = ["quantize", "tiny-dit", "-r", str(file), "--dry-run", "--json", "--dtype", "bfloat16"]
    told = json.loads(CliRunner().invoke(app, words).stdout)
    reelquant.quantize_folder("tiny-dit", tmp_path / "out", str(file), dtype=torch.bfloat16)
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert told["estimate"]["result"] == pytest.approx(written, rel=0.05) and way.size == pytest.approx(written, rel=0.05)


def test_speeds_are_those_of_this_machine_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REELQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr("reelquant.planning.timing.seconds_of", lambda work, device: 1e-3)
    how: dict[str, Any] = dict(recipes=["float", "w8a16"])
    made = survey("tiny-dit", **how)
    first = made.within(4 * 10**9)
    assert first.device == "cpu" and first.base > 1e8 and all(first.bands.values())
    speed = first.others[0].speed
    assert isinstance(speed, float) and 0.9 < speed < 1.5  # as many pieces of work, but for feed-forwards in blocks
    monkeypatch.setattr("reelquant.planning.timing.seconds_of", None)  # would fail if anything were timed again
    again = replace_timings(made)
    assert again.within(4 * 10**9).others[0].speed == speed
    with pytest.raises(RecipeError, match="nothing that fits into 4 GB is 50 times as fast: the fastest that fits is"):
        again.within(4 * 10**9, min_speed=50)


def replace_timings(made: Survey) -> Survey:
    """The same, and nothing in memory of what was timed."""
    return Survey(made.model, made.bench, made.every, made.base, made.call, made.dtype, made.progress)


def test_wrong_wishes_are_told() -> None:
    with pytest.raises(UnsupportedError, match=f"min_speed is measured on the device, and there is no '{CARD}'"):
        reelquant.plan("tiny-dit", max_memory=ROOM, device=CARD, min_speed=1.5)
    with pytest.raises(UnsupportedError, match="torch knows no device 'card'"):
        reelquant.plan("tiny-dit", max_memory=ROOM, device="card")
    with pytest.raises(RecipeError, match="plan needs a budget"):
        reelquant.plan("tiny-dit")
    with pytest.raises(RecipeError, match="'much' is not an amount of memory"):
        reelquant.plan("tiny-dit", max_memory="much")
    with pytest.raises(UnsupportedError, match="takes no argument 'num_frame'"):
        reelquant.plan("tiny-dit", max_memory=ROOM, num_frame=3)
    with pytest.raises(UnsupportedError, match="with a recipe"):
        reelquant.plan(reelquant.open_pipeline("tiny-dit"))


def test_the_tables_fit_80_columns(plans: dict[str, Planned]) -> None:
    for made in tables(plans["tiny-unet"]):
        check(made, 80)


KEEP = {"num_inference_steps": 4, "num_frames": 5, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def small() -> Survey:
    """Of a small clip of tiny-dit, in float32 as it is sampled in tests."""
    return survey("tiny-dit", CARD, torch.float32, recipes=["float"], call=KEEP)


@pytest.mark.parametrize("steps", [{"reuse": "blocks", "order": 1, "stretch": [0.0, 1.0]}, {"reuse": "attention"}, {"temporal": "table"}])
def test_what_is_kept_from_step_to_step_is_counted(small: Survey, steps: dict[str, Any]) -> None:
    data = {"name": "kept", "defaults": {"weight": {"format": "int8", "granularity": "channel"}}, "calibrate": {"prompts": 1, "steps": 4}}
    recipe = load_recipe(data | (steps if "temporal" in steps else {"steps": [steps]}))
    made = small.bench.made("denoisers", recipe, 0)
    found, plan = made.parts["transformer"], made.plans["transformer"]
    pipe = reelquant.open_pipeline("tiny-dit")
    reelquant.quantize(pipe, recipe, ["a red ball"], components=["transformer"], **KEEP)
    tables = sum(4 * one.output_table.numel() for one in quantized_layers(pipe.transformer).values() if hasattr(one, "output_table"))
    sample(pipe, ["a red ball"], output="latent", **KEEP)
    alive = sum(one.untyped_storage().nbytes() for one in _tensors(installed_reuse(pipe.transformer)))
    assert found.kept == alive
    assert (alive > 0) == ("reuse" in steps)
    counted = found.weights - quantized_bytes(plan, small.bench.parts["transformer"].model)
    assert tables <= counted <= 1.2 * tables  # the first layer of the embedding turns out not to be read


def test_what_data_will_choose_is_counted_as_if_most_was_kept(small: Survey) -> None:
    kept = {name: small.bench.made("denoisers", load_recipe(name), 0).parts["transformer"].kept for name in REUSING}
    change = kept["block-cache-w8a8"]
    assert kept["profilingdit"] == 3 * change  # half of six blocks, no two of them neighbours
    assert kept["ditfastattn"] > kept["adaspa"] > change > 0  # all places, self-attention, and one change of a stretch


REUSING = ("block-cache-w8a8", "profilingdit", "ditfastattn", "adaspa")


def _tensors(value: Any) -> list[torch.Tensor]:
    """Those that a reuse keeps of a trajectory."""
    held = [one.installed for one in value.values()]
    courses = [part.now.trajectory for one in held for part in getattr(one, "stretches", [one])]
    notes = [note for one in courses for note in one.notes.values()]
    histories = [one for course in courses for one in course.histories.values()] + [one for one in notes if isinstance(one, History)]
    found = [tensor for history in histories for _, some in history.kept for tensor in some]
    return found + [one for one in notes if isinstance(one, torch.Tensor)]


def test_clips_that_grow_take_the_memory_of_their_last_size(small: Survey) -> None:
    data = {"name": "grows", "defaults": {"weight": {"format": "int8", "granularity": "channel"}}, "calibrate": None}
    plain = small.bench.made("denoisers", load_recipe(data), 0)
    grows = small.bench.made("denoisers", load_recipe(data | {"resolution": [{"share": 0.5}, {"share": 0.5, "scale": 2.0}]}), 0)
    shrinks = small.bench.made("denoisers", load_recipe(data | {"resolution": [{"share": 0.5}, {"share": 0.5, "scale": 0.5}]}), 0)
    wide = survey("tiny-dit", CARD, torch.float32, recipes=["float"], call=KEEP | {"height": 64, "width": 64})
    assert grows.parts["transformer"].running == wide.bench.made("denoisers", load_recipe(data), 0).parts["transformer"].running
    assert shrinks.parts == plain.parts
    assert [small._smallest(one, "none")[1] for one in (shrinks, plain, grows)] == sorted(
        small._smallest(one, "none")[1] for one in (shrinks, plain, grows)
    )
    assert small._smallest(grows, "none")[1] == wide._smallest(wide.bench.made("denoisers", load_recipe(data), 0), "none")[1]


PARTS = {"a": Footprint(0, 100, 10, 20, 7), "b": Footprint(0, 40, 40, 0, 30)}


@pytest.mark.parametrize(("mode", "most"), [("none", 5 + 140 + 30), ("model", 5 + 107), ("group", 5 + 70)])
def test_offloading_takes_what_is_on_the_device(mode: str, most: int) -> None:
    assert peak(PARTS, 5, (), mode) == most  # group: 10 + 2 * 20 + 7 of the first, all 40 and 30 of the second
