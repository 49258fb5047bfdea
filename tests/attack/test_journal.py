"""Interrupted runs whose files are damaged before they go on: the result has the same bytes, or one sentence says what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import reelquant
from reelquant import CheckpointError
from tests.attack.journals import MOMENTS, RECIPE, Interrupted, contents, stopped, whole
from tests.attack.outcomes import observed
from tests.grids import ALL


@pytest.fixture(scope="module")
def interrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    make = tmp_path_factory.mktemp
    return Interrupted(source, stopped(source, make("stopped"), MOMENTS[0]), whole(source, make("whole")))


@pytest.mark.parametrize("seed", range(12 if ALL else 3))
def test_a_damaged_journal_changes_nothing(interrupted: Interrupted, tmp_path: Path, seed: int) -> None:
    assert observed(f"journal {seed}", lambda: interrupted.damaged(seed, tmp_path)) == []


def test_a_log_that_is_gone_is_sampled_again(interrupted: Interrupted, source: Path, tmp_path: Path) -> None:
    work = Path(shutil.copytree(interrupted.work, tmp_path / "out.partial"))
    for file in (*work.glob("work/*/journal/seen/*.inputs"), *work.glob("work/*/final/*/*.safetensors")):
        file.unlink()
    reelquant.quantize_folder(source, tmp_path / "out", RECIPE, resume=True)
    assert contents(tmp_path / "out") == interrupted.whole


def test_a_call_that_a_killed_run_was_writing_is_removed(interrupted: Interrupted, source: Path, tmp_path: Path) -> None:
    work = Path(shutil.copytree(interrupted.work, tmp_path / "out.partial"))
    (call, *_) = work.glob("work/*/journal/calls/calibrate-*/[0-9]*.safetensors")
    call.with_name(".writing-000004.safetensors").write_bytes(b"half")
    reelquant.quantize_folder(source, tmp_path / "out", RECIPE, resume=True)
    assert contents(tmp_path / "out") == interrupted.whole


@pytest.mark.parametrize("content", ["{", "[]", "null", "{}", '{"reelquant": []}', "[" * 5000])
def test_a_broken_work_json_is_one_sentence(source: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "work.json").write_text(content)
    if content != "{}":  # nothing: work that was being given up
        with pytest.raises(CheckpointError, match=r"work.json|begun with another"):
            reelquant.quantize_folder(source, tmp_path / "out", "w8a16", resume=True)
    reelquant.quantize_folder(source, tmp_path / "out", "w8a16", force=True)
    assert reelquant.verify(tmp_path / "out").files
