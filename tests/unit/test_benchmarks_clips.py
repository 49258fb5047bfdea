"""Benchmarks of quality: which pipelines they take, and what they call them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import library, reel, trust
from benchmarks.beside import Rows
from benchmarks.common import Clips
from reelquant.recipes.recipe import load_recipe, names


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


def test_every_recipe_of_the_library_is_measured_beside_a_plain_row() -> None:
    assert set(names()) == {source for source, _ in library.ROWS.values() if isinstance(source, str)} | set(library.ELSEWHERE)


@pytest.mark.parametrize("rows", [library.ROWS, reel.ROWS], ids=["library", "reel"])
def test_rows_are_told_apart_and_held_against_rows_that_are_there(rows: Rows) -> None:
    assert {rival for _, rival in rows.values()} - {""} <= set(rows)
    digests = [load_recipe(source).digest() for source, _ in rows.values()]
    assert len(set(digests)) == len(digests)
