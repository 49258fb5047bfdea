"""What a dry run says that stages will compute, beside what they then do compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import reelquant
from reelquant.cli import app
from reelquant.engine.calibration import Expected
from reelquant.recipes.recipe import load_recipe
from reelquant.stages import BlockWork
from reelquant.streaming import Job, Source
from reelquant.streaming.estimate import Estimate
from reelquant.streaming.stage_calls import StageCalls
from tests.tiny.stock import CALL, PROMPTS, stored_pipeline, wan_pipeline

PLAIN: dict[str, Any] = {
    "name": "plain",
    "defaults": {"weight": {"format": "int4", "granularity": "channel"}, "input": {"format": "uint8"}},
    "calibrate": {"prompts": 2, "steps": 3},
    "search": {"prompts": 1},
}
STAGES: dict[str, dict[str, Any]] = {
    "allocate milp": {
        "steps": [{"allocate": "milp", "bits": 6, "calls": 3, "formats": ["int4/channel", "int8/channel"], "on": "role:main"}]
    },
    "reconstruct adaround": {"steps": [{"reconstruct": "adaround", "calls": 4, "iterations": 10, "on": "role:main"}]},
    "reconstruct lsq": {"steps": [{"reconstruct": "lsq", "trajectory": "quantized", "calls": 4, "iterations": 10, "on": "role:main"}]},
    "policy protect_steps": {"protect_steps": "auto"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_pipeline(tmp_path_factory.mktemp("model") / "wan")


def computed(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[int, float]:
    """Calls of the denoiser in a run, and calls of its parts as a share of all blocks, those with a gradient counted three times."""
    pipe, whole, parts, output = wan_pipeline(), [0], [0.0], BlockWork.output

    def count(module: Any, args: Any) -> None:
        whole[0] += 1

    def counted(block: BlockWork, call: Any) -> Any:
        parts[0] += (3 if torch.is_grad_enabled() else 1) / len(pipe.transformer.blocks)
        return output(block, call)

    pipe.transformer.register_forward_pre_hook(count)
    with monkeypatch.context() as patched:
        patched.setattr(BlockWork, "output", counted)
        reelquant.quantize(pipe, recipe, PROMPTS, **CALL)
    return whole[0], parts[0]


def estimate(folder: Path, recipe: dict[str, Any]) -> Estimate:
    return Job.of(Source.open(folder), {"transformer": load_recipe(recipe)}, None, (), CALL, 10**10).estimate()


def planned(folder: Path, recipe: dict[str, Any]) -> tuple[StageCalls, Estimate]:
    job = Job.of(Source.open(folder), {"transformer": load_recipe(recipe)}, None, (), CALL, 10**10)
    plan = job.plans["transformer"]
    return StageCalls.of(plan, plan.entries[0], Expected.of(2, 1, CALL)), job.estimate()


@pytest.mark.parametrize("name", STAGES)
def test_calls_are_at_most_what_was_said_and_not_far_below(name: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, expected = planned(model, PLAIN | STAGES[name])
    plain, _ = computed(PLAIN, monkeypatch)
    whole, parts = computed(PLAIN | STAGES[name], monkeypatch)
    assert said.name == name and said.whole + said.own > 0
    assert 0.5 * (said.whole + said.own) <= whole - plain + parts <= said.whole + said.own
    assert expected.stages == {name: said.whole + said.own}
    assert expected.calls == estimate(model, PLAIN).calls + said.whole + said.own


def test_replayed_calls_are_read_from_disk_when_it_streams(model: Path) -> None:
    plain, (said, more) = estimate(model, PLAIN), planned(model, PLAIN | STAGES["reconstruct adaround"])
    assert more.moved - plain.moved == said.replayed * Source.open(model).stored()["transformer"] and more.result == plain.result
    assert said.replayed == 2 * len(wan_pipeline().transformer.blocks) * min(2 * 4, 2 * 6)


def test_a_dry_run_shows_every_stage(model: Path) -> None:
    steps = [{"reuse": "blocks", "stretch": [0.0, 1.0]}, *STAGES["allocate milp"]["steps"], *STAGES["reconstruct adaround"]["steps"]]
    keys = {"temporal": "table", "guidance": "separate", "attention": {"scores": "int8"}, "protect_steps": [0]}
    recipe = model.parent / "all.yaml"
    recipe.write_text(json.dumps(PLAIN | keys | {"steps": steps}))
    words = ["quantize", str(model), "-r", str(recipe), "--dry-run"]
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    names = ["blocks", "milp", "adaround", "temporal_table", "guidance", "attention", "protect_steps"]
    assert sorted(stage["name"] for stage in told["stages"]) == sorted(names)
    assert set(told["estimate"]["stages"]) == {"allocate milp", "reconstruct adaround"}
    shown = " ".join(CliRunner().invoke(app, words, env={"COLUMNS": "160"}).stdout.split())
    for said in (
        "do not compute blocks (stretch [0.0, 1.0]). Compute a stretch of consecutive blocks at some steps only. all",
        f"{told['estimate']['stages']['allocate milp']} calls of these for allocate milp",
        "run with attention (scores int8",
        "simulated: codes are multiplied in float",
    ):
        assert said in shown, said


def test_a_dry_run_refuses_to_stream_what_needs_memory(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "milp.yaml"
    recipe.write_text(json.dumps(PLAIN | STAGES["allocate milp"]))
    refused = CliRunner().invoke(app, ["quantize", str(model), "-r", str(recipe), "--dry-run", "--max-memory", "1MB"])
    assert refused.exit_code != 0 and "needs the model in memory, because 'allocate: milp'" in " ".join(refused.stderr.split())
