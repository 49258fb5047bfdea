"""Which recipes fit, by folders alone: budgets, errors, commands, and sizes beside what is then written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import reelquant
from reelquant._errors import RecipeError, UnsupportedError
from reelquant.cli import app
from reelquant.cli.plan import tables
from reelquant.engine.sizes import layers_bytes
from reelquant.planning import Planned, quality
from reelquant.planning.formats import choose_formats
from reelquant.planning.memory import Footprint, peak
from reelquant.planning.plan import Survey, survey
from reelquant.recipes.recipe import load_recipe, names
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


def test_bits_give_a_recipe_that_quantize_reads(surveys: dict[str, Survey], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    words = ["plan", "tiny-dit", "--max-memory", ROOM, "--device", CARD, "--bits", "5.5", "-o", str(file)]
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    recipe = load_recipe(file)
    allocated = next(entry.stage for entry in recipe.entries if "choose_specs" in entry.stage.hooks())
    assert allocated.bits == 5.5 and yaml.safe_load(told["best"]["recipe"])["name"] == "planned-w5.5a8"
    assert told["written"] == str(file) and f"-r {file}" in told["best"]["command"]
    assert "exists" in CliRunner().invoke(app, words).stderr
    plan = surveys["tiny-dit"].bench.allocated(5.5).plans["transformer"]
    weights = sum(row.bytes_before / 4 for row in plan.quantized)
    assert layers_bytes(plan) == pytest.approx(5.5 / 8 * weights, rel=0.05)
    with pytest.raises(RecipeError, match=r"--bits lies between 3\.26 and 8 bits"):
        choose_formats(2.0)


def test_commands_are_what_they_say(surveys: dict[str, Survey], plans: dict[str, Planned]) -> None:
    ways = {way.recipes["transformer"]: way for way in plans["tiny-dit"].others if way.offload == "none"}
    assert ways["qvd-w8a8"].command == "reelquant quantize tiny-dit -r qvd-w8a8 --dtype bfloat16 -o out"
    assert set(ways) <= {*names(), "float"}
    for way in plans["tiny-unet"].others:
        quantized = {name: recipe for name, recipe in way.recipes.items() if recipe != "float"}
        assert all(recipe in way.command for recipe in quantized.values())


def test_quality_is_told_where_it_was_measured(plans: dict[str, Planned]) -> None:
    told = {way.recipes["transformer"]: way.quality for way in plans["tiny-dit"].others}
    assert told["w8a16"] == quality.NOT_MEASURED
    assert told["qvd-w8a8"].endswith(" dB") and quality.measured("tiny-dit", "qvd-w8a8") is not None
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


PARTS = {"a": Footprint(0, 100, 10, 20, 7), "b": Footprint(0, 40, 40, 0, 30)}


@pytest.mark.parametrize(("mode", "most"), [("none", 5 + 140 + 30), ("model", 5 + 107), ("group", 5 + 70)])
def test_offloading_takes_what_is_on_the_device(mode: str, most: int) -> None:
    assert peak(PARTS, 5, (), mode) == most  # group: 10 + 2 * 20 + 7 of the first, all 40 and 30 of the second
