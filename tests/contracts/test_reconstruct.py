"""Contract of RECONSTRUCTIONS: held-out errors do not rise, one seed gives one result, nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reelquant
from reelquant.engine import blocks as engine
from reelquant.engine.report import Report
from reelquant.nn import quantized_layers
from reelquant.reconstruct import RECONSTRUCTIONS
from reelquant.reconstruct.error import mean_error, split
from reelquant.reconstruct.soft import soften
from reelquant.stages import BlockWork, Solution, Stage
from tests.tiny.stock import CALL, PROMPTS, contents, quantized_in_memory, stored_pipeline, wan_pipeline

# parameters that make a member quick; a new member is tested with its defaults the moment it enters the table
QUICK: dict[str, dict[str, Any]] = {
    "adaround": {"iterations": 30, "calls": 8, "rate": 0.2, "weight": 10.0},
    "lsq": {"iterations": 20, "calls": 8, "input_rate": 0.02},
    "scales": {"iterations": 30, "calls": 8, "rate": 0.01},
    "straight_through": {"iterations": 30, "calls": 8, "rate": 0.02, "rank": 4, "input_rate": 0.01},
}
SCOPES: dict[str, dict[str, str]] = {
    "block": {"on": "role:main"},
    "layer": {"scope": "layer", "on": "blocks.0.ffn"},
    "temporal": {"scope": "temporal", "on": "role:temporal"},
    "model": {"scope": "model", "on": "role:main"},
}
CASES = [(name, scope) for name in RECONSTRUCTIONS for scope in SCOPES]


def recipe(name: str | None, scope: str = "block") -> dict[str, Any]:
    steps = [{"reconstruct": name} | QUICK.get(name, {}) | SCOPES[scope]] if name else []
    return {
        "name": "test",
        "defaults": {"weight": {"format": "int3", "granularity": "channel"}, "input": {"format": "uint4", "slots": "per_step"}},
        "rules": [
            {"on": "role:entry | role:exit | role:prompt", "skip": True},
            {"on": "role:temporal", "input": {"format": "int4"}},
        ],
        "calibrate": {"prompts": 2, "steps": 3},
        "steps": [{"transform": "shift", "on": "role:main"}, {"solve": "nearest", "correct_bias": True, "on": "*"}, *steps],
    }


def quantized(name: str | None, scope: str = "block") -> tuple[Any, Report]:
    pipe = wan_pipeline()
    return pipe, reelquant.quantize(pipe, recipe(name, scope), PROMPTS, **CALL)


def tensors(pipe: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in pipe.transformer.state_dict().items()}


@pytest.fixture(scope="module")
def plain() -> tuple[dict[str, Tensor], Report]:
    """The same recipe without reconstruction."""
    pipe, report = quantized(None)
    return tensors(pipe), report


class Watching:
    """Calls a member, and keeps what it was asked and what it answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.seen: list[tuple[BlockWork, Mapping[str, Solution]]] = []
        member: type[Stage] = RECONSTRUCTIONS[name]
        solve = member.solve_block

        def watched(stage: Stage, block: BlockWork) -> Mapping[str, Solution]:
            untouched = replace(block, module=copy.deepcopy(block.module))
            for one, other in zip(quantized_of(untouched.module), quantized_of(block.module), strict=True):
                one.clock = other.clock
            solutions = solve(stage, block)
            self.seen.append((untouched, solutions))
            return solutions

        monkeypatch.setattr(member, "solve_block", watched)


def quantized_of(module: nn.Module) -> list[Any]:
    return list(quantized_layers(module).values())


def errors(block: BlockWork, solutions: Mapping[str, Solution]) -> tuple[float, float]:
    """On held-out calls, before and after."""
    calls = block.calls(True)
    _, held_out = split(len(calls))
    before = mean_error(block, calls, held_out)
    block, soft = soften(block)
    for path, solution in solutions.items():
        soft[path].take(solution)
    return before, mean_error(block, calls, held_out)


@pytest.mark.parametrize(("name", "scope"), CASES)
def test_held_out_errors_fall_or_codes_stay(
    name: str, scope: str, plain: tuple[dict[str, Tensor], Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    watching = Watching(monkeypatch, name)
    pipe, report = quantized(name, scope)
    assert watching.seen
    kept = [block.name for block, solutions in watching.seen if not solutions]
    for block, solutions in watching.seen:
        before, after = errors(block, solutions)
        # the bias that a layer stores is rounded, sums of kernels have another order
        assert after < before * (1 + 1e-4) if solutions else after == pytest.approx(before, rel=1e-3), block.name
    counted = [warning for warning in report.warnings if "codes stay as they are" in warning]
    assert len(counted) == bool(kept)
    if kept:
        assert counted[0].startswith(f"{len(kept)} of {len(watching.seen)} parts: ") and kept[0] in counted[0]
    _check_the_rest(tensors(pipe), report, watching, *plain)


def _check_the_rest(found: dict[str, Tensor], report: Report, watching: Watching, before: dict[str, Tensor], plain: Report) -> None:
    """Layers that have no better codes keep every byte and every figure; those that do keep all but codes, bias and scales of inputs."""
    changed = {f"{block.name}.{path}".strip(".") for block, solutions in watching.seen for path in solutions}
    assert changed, "a recipe of 3 bits leaves something to gain"
    for key, value in before.items():
        layer, _, part = key.rpartition(".")
        if layer not in changed or part not in ("weight", "weight_scale", "bias", "input_scale"):
            assert torch.equal(found[key], value), key
    for one, other in zip(report.layers, plain.layers, strict=True):
        assert one.solver != "nearest" if one.name in changed else one == other, one.name


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_two_runs_give_the_same_bytes(name: str) -> None:
    first, second = (tensors(quantized(name)[0]) for _ in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_later_stage_keeps_the_scales_that_an_earlier_one_learned() -> None:
    first = recipe("lsq")
    both = first | {"steps": [*first["steps"], *recipe("adaround")["steps"][-1:]]}
    alone, together = (wan_pipeline() for _ in range(2))
    reelquant.quantize(alone, first, PROMPTS, **CALL)
    reelquant.quantize(together, both, PROMPTS, **CALL)
    alone, together = tensors(alone), tensors(together)
    scales = [name for name in alone if name.endswith("input_scale")]
    assert scales and all(torch.equal(alone[name], together[name]) for name in scales)
    assert any(not torch.equal(alone[name], together[name]) for name in alone if name.endswith(".weight"))


# ------------------------------------------------------------------------------------------------------------- from disk to disk


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_pipeline(tmp_path_factory.mktemp("model") / "wan")


def denoiser(place: Path) -> dict[str, bytes]:
    return contents(place / "transformer")


class Stopped(Exception):  # noqa: N818  (it is not an error)
    """Stands for a process that is killed."""


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_streaming_gives_the_bytes_of_a_run_in_memory_also_after_a_stop_between_blocks(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe(name)
    expected = quantized_in_memory(folder, chosen, tmp_path / "memory")
    reelquant.quantize_folder(folder, tmp_path / "disk", chosen)
    assert denoiser(tmp_path / "disk") == denoiser(tmp_path / "memory")

    real, solved = engine._solve_unit, list[str]()

    def stopping(session: Any, entry: Any, unit: str, *rest: Any) -> Any:
        if solved:
            raise Stopped
        solved.append(unit)
        return real(session, entry, unit, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_solve_unit", stopping)
        with pytest.raises(Stopped):
            reelquant.quantize_folder(folder, tmp_path / "stopped", chosen)
    watching = Watching(monkeypatch, name)
    report = reelquant.quantize_folder(folder, tmp_path / "stopped", chosen, resume=True)
    assert solved[0] not in [block.name for block, _ in watching.seen] and watching.seen
    assert denoiser(tmp_path / "stopped") == denoiser(tmp_path / "memory")
    assert report.warnings == expected.warnings
