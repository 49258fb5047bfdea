"""Benchmarks of quality: which pipelines they take, and what they call them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import trust
from benchmarks.common import Clips


def test_a_folder_called_pipeline_has_the_name_of_the_folder_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tiny-ltx" / "pipeline"
    folder.mkdir(parents=True)
    assert Clips("tiny-dit", 1).name == "tiny-dit"
    assert Clips("runs/mine", 1).name == "mine"
    assert Clips(str(folder), 1).name == "tiny-ltx"
    monkeypatch.chdir(folder.parent)
    assert Clips("pipeline", 1).name == "tiny-ltx"


def test_a_calibration_that_says_nothing_about_a_pipeline_is_refused() -> None:
    trust.check_known("tiny-ltx", trust.CALIBRATIONS)
    trust.check_known("mine", ["as usual", "4 prompts"])
    for label in ("another size", "8 steps", "another scheduler"):
        with pytest.raises(SystemExit, match=f"'{label}' is not defined for 'mine'"):
            trust.check_known("mine", [label])
