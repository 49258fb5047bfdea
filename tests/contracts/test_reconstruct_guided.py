"""Contract of RECONSTRUCTIONS that count errors as guidance does: held-out errors do not rise, the same bytes from disk and from memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import reelquant
from reelquant.clock import FIRST, SECOND
from reelquant.engine import blocks as engine
from reelquant.reconstruct import RECONSTRUCTIONS
from reelquant.reconstruct.guided import units_of
from reelquant.reconstruct.soft import soften
from tests.contracts.test_reconstruct import Stopped, Watching, denoiser, recipe
from tests.tiny.stock import CALL, PROMPTS, quantized_in_memory, stored_pipeline, wan_pipeline


def guided(name: str) -> dict[str, Any]:
    """A recipe whose reconstruction counts with guidance, all steps alike."""
    chosen = recipe(name)
    steps = chosen["steps"]
    return chosen | {"steps": [*steps[:-1], steps[-1] | {"guidance": 5.0, "unit": "own"}]}


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_guided_errors_of_held_out_pairs_fall_or_codes_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watching = Watching(monkeypatch, name)
    reelquant.quantize(wan_pipeline(), guided(name), PROMPTS, **CALL)
    assert any(solutions for _, solutions in watching.seen)
    stage = RECONSTRUCTIONS[name](guidance=5.0, unit="own")  # type: ignore[call-arg]
    for block, solutions in watching.seen:
        calls = block.calls(True)
        units = units_of(calls)
        assert [[calls[one].half for one in unit] for unit in units] == [[FIRST, SECOND]] * len(units)
        held_out = list(range(len(units) - 1, -1, -4))
        before = stage._errors(block, calls, held_out)  # type: ignore[attr-defined]
        block, soft = soften(block)
        for path, solution in solutions.items():
            soft[path].take(solution)
        after = stage._errors(block, calls, held_out)  # type: ignore[attr-defined]
        mean = sum(after[number] / before[number] for number in held_out) / len(held_out)
        assert mean < 1 + 1e-4 if solutions else mean == pytest.approx(1, rel=1e-3)


def test_streaming_gives_the_bytes_of_a_run_in_memory_also_after_a_stop_between_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, chosen = stored_pipeline(tmp_path / "wan"), guided("adaround")
    quantized_in_memory(folder, chosen, tmp_path / "memory")
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
    reelquant.quantize_folder(folder, tmp_path / "stopped", chosen, resume=True)
    assert denoiser(tmp_path / "stopped") == denoiser(tmp_path / "memory")


def test_a_calibration_without_pairs_is_not_used_for_guidance() -> None:
    from reelquant.engine.run import quantize_pipeline
    from reelquant.recipes.recipe import load_recipe

    pipe, plain, own = wan_pipeline(), load_recipe(recipe("adaround")), load_recipe(guided("adaround"))
    _, calibration = quantize_pipeline(pipe, plain, PROMPTS, **CALL)
    assert calibration is not None and not calibration.whole_pairs
    _, fresh = quantize_pipeline(wan_pipeline(), own, PROMPTS, calibration=calibration, **CALL)
    assert fresh is not calibration and fresh is not None and fresh.whole_pairs
