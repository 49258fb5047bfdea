"""What ``reelquant tune`` prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reelquant.cli import app
from reelquant.reuse import BlockReuse
from reelquant.tuning import Seconds, Trial, Tuned


def trial(count: int, psnr: float, *failures: str) -> Trial:
    return Trial(tuple(range(count)), 20, 1, {"psnr": psnr, "motion_deviation": -0.01}, psnr - 4, failures, 20 / count)


PASSED, MISSED = trial(8, 40.0), trial(5, 22.0, "PSNR is 22.0 dB and misses the limit (at least 25) by 3.0")


def invoke(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str, found: bool = True) -> tuple[Any, dict[str, Any]]:
    """The command with a stand-in for the work: what it printed, and what it asked for."""
    asked: dict[str, Any] = {}

    def tune(model: Any, output: Path, **options: Any) -> Tuned:
        asked.update(options, model=model, output=output)
        trials = (trial(14, 50.0), PASSED, MISSED) if found else (MISSED,)
        stage = BlockReuse(at=(9.0,)) if found else None
        return Tuned(
            stage, PASSED if found else None, trials, Seconds(1.0, 0.1, 0.0, 2), 2.4 if found else None, output if found else None, folder
        )

    monkeypatch.setattr("reelquant.api.tune", tune)
    return CliRunner().invoke(app, ["tune", "tiny-dit", "-o", str(folder / "fast"), *words]), asked


def test_the_choice_its_speed_and_the_cliff_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, _ = invoke(monkeypatch, tmp_path)
    said = " ".join(result.output.split())
    assert result.exit_code == 0
    assert "computed at 8 of 20 steps (40%): 1, 2, 3, 4, 5, 6, 7, 8" in said
    assert "2.40x as fast, whole clips in turns; expected 2.50x" in said
    assert "from 8 to 5 computed steps PSNR falls by 18.0 dB" in said  # 6 dB a step; 1.7 between 14 and 8
    assert "1 missed" in said


def test_nothing_chosen_says_what_was_missed_and_exits_with_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, _ = invoke(monkeypatch, tmp_path, found=False)
    assert result.exit_code == 1
    assert "no schedule kept the limits" in result.output and "misses the limit (at least 25)" in " ".join(result.output.split())


def test_json_is_one_document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, _ = invoke(monkeypatch, tmp_path, "--json")
    found = json.loads(result.stdout)
    assert found["stage"]["at"] == [9.0] and found["chosen"]["steps"] == 20 and len(found["trials"]) == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"target_speedup": None, "gate": "default", "limits": {}, "stretch": (0.0, 1.0)}),
        (["--record", "1", "--clips", "3"], {"record": 1, "clips": 3}),
        (["--target-speedup", "1.8"], {"target_speedup": 1.8, "gate": "default"}),
        (["--max-lpips", "0.1"], {"gate": None, "limits": {"lpips_alex": 0.1}}),
        (["--gate", "strict", "--fail-under", "PSNR=30"], {"gate": "strict", "limits": {"psnr": 30.0}}),
        (["--stretch", "answer"], {"stretch": ()}),
        (["--stretch", "0.25:0.75", "--steps", "30"], {"stretch": (0.25, 0.75), "num_inference_steps": 30}),
    ],
)
def test_options_become_wishes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], expected: dict[str, Any]) -> None:
    result, asked = invoke(monkeypatch, tmp_path, *words)
    assert result.exit_code == 0, result.output
    assert {name: asked[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stretch", "half"], "--stretch takes a start and an end, or 'answer', got 'half'"),
        (["--target-speedup", "2", "--gate", "default"], "give one of them"),
        (["--fail-under", "psnrr=3"], "unknown metric 'psnrr'"),
        (["--fail-under", "psnr=much"], "'much' is not a number"),
    ],
)
def test_wrong_options_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], message: str) -> None:
    result, asked = invoke(monkeypatch, tmp_path, *words)
    assert result.exit_code != 0 and not asked and message in result.output
