"""Fuzzed recipes: whatever stands in one, the answer is a plan or one sentence of ours, within a second."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import reelquant
from reelquant import RecipeError, SiteError
from reelquant.engine.plan import make_plan
from reelquant.recipes.recipe import load_recipe, parse_value
from tests.attack import fuzz
from tests.attack.damage import within
from tests.attack.outcomes import observed
from tests.grids import ALL
from tests.tiny.configs import TINY
from tests.tiny.pipelines import FakePipeline

TEXTS = [
    "a: !!int abc", "a: 2020-99-99", "a: !!timestamp x", "a: !!float x", "a: !!binary '*'",
    "a: !!python/object:os.system x", "? [1, 2]\n: 3",
    "a: &a [*a]", "a: &a {b: *a}", "<<: [1]", "a: {<<: 3}", "[" * 5000, "{" * 3000, "a: 0x", "a: 1__", "a: " + "9" * 6000, "a: 0b",
    "a: 190:20:30", "%YAML 9.9\n---\na: 1", "--- a\n--- b", "\ud800", "a: \x07", "*a", "&a", "!", "|", "a: !<tag> b", "? ", "- - - -", "\t",
]  # fmt: skip


def bomb(levels: int, wide: int, merge: bool = False) -> str:
    lines = ["a0: &a0 {k: 1}" if merge else "a0: &a0 [1]"]
    for i in range(1, levels):
        parts = ", ".join([f"*a{i - 1}"] * wide)
        lines.append(f"a{i}: &a{i} {{<<: [{parts}]}}" if merge else f"a{i}: &a{i} [{parts}]")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def map_and_model() -> fuzz.Target:
    return fuzz.target()


@pytest.mark.parametrize("seed", range(60 if ALL else 40))
def test_fuzzed(seed: int, map_and_model: fuzz.Target, tmp_path: Path) -> None:
    assert observed(f"recipe {seed}", lambda: fuzz.planned(fuzz.fuzzed(seed, tmp_path), map_and_model), seconds=2) == []


@pytest.mark.parametrize("text", [*TEXTS, bomb(9, 9), bomb(9, 9, merge=True), bomb(30, 2)], ids=lambda text: ascii(text[:12]))
def test_text_that_is_no_recipe(text: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with within(1), pytest.raises(RecipeError):
        load_recipe(file)
    with within(1), suppress(RecipeError):
        parse_value(text)


def test_aliases_are_not_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("name: a\ndefaults: {weight: &w {format: int8, granularity: channel}}\nrules: [{on: 'role:temporal', weight: *w}]\n")
    assert load_recipe(file).rules[0].weight == load_recipe(file).defaults.weight


def base(**more: Any) -> dict[str, Any]:
    return {"name": "a", "defaults": {"weight": {"format": "int4", "granularity": "channel"}}, "calibrate": None, **more}


HUGE = [
    base(steps=[{"transform": "range_integrate", "power": [0.1] * 10, "cap": [1.0] * 10, "on": f"*{i}"} for i in range(5)], calibrate={}),
    base(steps=[{"transform": "range_integrate", "power": list(range(1000)), "cap": list(range(1000))}], calibrate={}),
    base(defaults={"weight": {"format": "int4", "granularity": "frame-1000000000"}}),
    base(defaults={"weight": {"format": "int4", "granularity": "group-1000000000000000000"}}),
    base(defaults={"weight": {"format": "int4", "range": {"name": "mse", "candidates": 10**9}}}),
    base(steps=[{"solve": "gptq", "block": 10**9}], calibrate={}),
    base(steps=[{"solve": "gptq", "block": 0}], calibrate={}),
    base(steps=[{"reuse": "blocks", "stretch": ["a", "b"]}], calibrate={}),
    base(calibrate={"prompts": 10**9}),
    base(calibrate={"seed": 2**64}),
    base(summary="x" * 10**6),
]


@pytest.mark.parametrize("data", HUGE, ids=lambda data: ascii(str(data)[90:130]))
def test_huge_numbers_are_refused(data: dict[str, Any]) -> None:
    with within(1), pytest.raises(RecipeError):
        load_recipe(data)


def test_a_group_wider_than_a_row_costs_no_memory() -> None:
    """It is padded to the row, not to its size, and gives what a scale per row gives."""
    found = []
    for granularity in ("group-900000000", "group-24"):
        pipe = FakePipeline(TINY["WanTransformer3DModel"]())
        with within():
            reelquant.quantize(pipe, base(defaults={"weight": {"format": "int4", "granularity": granularity}}), prompts=["a"])
        found.append(pipe.denoiser.get_submodule("blocks.0.attn1.to_q").dequantized_weight())
    assert torch.equal(*found)


@pytest.mark.parametrize("pattern", [r"re:(a+)+b", r"re:(a|ab)*b", r"re:(a?){30}a{30}", r"re:.*.*.*.*.*b", "re:" + "(" * 900, "re:["])
def test_patterns_that_backtrack_are_refused(pattern: str, map_and_model: fuzz.Target) -> None:
    with within(1), pytest.raises(SiteError, match=r"cannot be used|not a regular expression"):
        make_plan(load_recipe(base(rules=[{"on": pattern, "skip": True}])), *map_and_model)


def test_files_that_are_no_files(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "big.yaml").write_text("#" * 2_000_000)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    for name in ("pipe.yaml", "folder.yaml", "big.yaml", "latin.yaml", "x" * 300 + ".yaml", "nul\0.yaml"):
        with within(1), pytest.raises(RecipeError):
            load_recipe(tmp_path / name)
