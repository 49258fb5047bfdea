"""Contract of RECONSTRUCTIONS that learn on calls of the quantized pipeline: whose calls, which targets, the same bytes every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import reelquant
from reelquant._errors import RecipeError
from reelquant.engine import blocks as engine
from reelquant.recipes.recipe import load_recipe
from reelquant.reconstruct import RECONSTRUCTIONS
from tests.contracts.test_reconstruct import Stopped, Watching, denoiser, errors, recipe, tensors
from tests.tiny.stock import CALL, PROMPTS, quantized_in_memory, stored_pipeline, wan_pipeline


def again(name: str, rounds: int = 1) -> dict[str, Any]:
    """A recipe with so many rounds of a reconstruction, the last one on the quantized pipeline's trajectories."""
    first = recipe(name)
    own = first["steps"][-1] | {"trajectory": "quantized"}
    return first | {"steps": [*first["steps"][:-1], *([first["steps"][-1]] * (rounds - 1)), own]}


def quantized(chosen: dict[str, Any]) -> Any:
    pipe = wan_pipeline()
    return pipe, reelquant.quantize(pipe, chosen, PROMPTS, **CALL)


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_calls_are_those_of_the_quantized_trajectory_and_targets_those_of_the_float_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watching = Watching(monkeypatch, name)
    quantized(recipe(name))
    floats = [block.calls(False) for block, _ in watching.seen]
    watching.seen.clear()
    quantized(again(name))
    exact = wan_pipeline().transformer
    for (block, solutions), known in zip(watching.seen, floats, strict=True):
        calls = block.calls(False)
        assert len(calls) == len(known) and [call.step for call in calls] == [call.step for call in known]
        latest = len(calls) - 1  # first calls of a trajectory have the same noise
        assert not torch.equal(calls[latest].args[0], known[latest].args[0])
        with torch.no_grad():
            for call, prefixed in zip(calls, block.calls(True), strict=True):
                wanted = exact.get_submodule(block.name)(*call.args, **call.kwargs)
                for one, other in zip(tree_leaves(wanted), tree_leaves(call.output), strict=True):
                    torch.testing.assert_close(one, other)
                assert all(torch.equal(a, b) for a, b in zip(tree_leaves(call.output), tree_leaves(prefixed.output), strict=True))
        before, after = errors(block, solutions)
        assert after < before * (1 + 1e-4) if solutions else after == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_two_runs_give_the_same_bytes_and_others_than_one_round(name: str) -> None:
    (one, report), (other, _), (once, _) = (quantized(chosen) for chosen in (again(name, 2), again(name, 2), recipe(name)))
    first, second, single = (tensors(pipe) for pipe in (one, other, once))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    kept = any(warning.startswith("2 of 2 parts: codes stay") for warning in report.warnings)
    assert kept or any(not torch.equal(value, single[key]) for key, value in first.items())


@pytest.mark.parametrize("name", list(RECONSTRUCTIONS)[:1])
def test_streaming_gives_the_bytes_of_a_run_in_memory_also_after_a_stop_in_either_round(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, chosen = stored_pipeline(tmp_path / "wan"), again(name, 2)
    expected = quantized_in_memory(folder, chosen, tmp_path / "memory")
    real = engine._solve_unit
    for stops in (1, 3):  # two blocks in each round
        solved = list[str]()

        def stopping(session: Any, entry: Any, unit: str, *rest: Any, solved: list[str] = solved, stops: int = stops) -> Any:
            if len(solved) == stops:
                raise Stopped
            solved.append(unit)
            return real(session, entry, unit, *rest)

        with monkeypatch.context() as patched:
            patched.setattr(engine, "_solve_unit", stopping)
            with pytest.raises(Stopped):
                reelquant.quantize_folder(folder, tmp_path / f"stopped-{stops}", chosen)
        report = reelquant.quantize_folder(folder, tmp_path / f"stopped-{stops}", chosen, resume=True)
        assert denoiser(tmp_path / f"stopped-{stops}") == denoiser(tmp_path / "memory")
        assert report.warnings == expected.warnings


def test_a_wrong_word_is_an_error() -> None:
    with pytest.raises(RecipeError, match="unknown trajectory 'quantised' of adaround; did you mean 'quantized'"):
        load_recipe(again("adaround") | {"steps": [{"reconstruct": "adaround", "trajectory": "quantised"}]})


def test_targets_are_exact_where_attention_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    watching = Watching(monkeypatch, "adaround")
    quantized(recipe("adaround"))
    plain = [block.calls(False)[0].output for block, _ in watching.seen]
    watching.seen.clear()
    quantized(recipe("adaround") | {"attention": {"scores": "int4", "values": "e4m3"}})
    found = [block.calls(False)[0].output for block, _ in watching.seen]
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))
