"""Interrupted runs whose files are damaged before they go on: the result has the same bytes, or one sentence says what is wrong."""

from __future__ import annotations

import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

import reelquant
from reelquant import CheckpointError
from reelquant.models.manifest import REPORT
from reelquant.streaming import run
from tests.attack.damage import DAMAGES, files_of
from tests.grids import ALL

RECIPE = {
    "name": "test",
    "defaults": {"weight": {"format": "int4", "granularity": "channel"}, "input": {"format": "uint8"}},
    "rules": [{"on": "!*attn1.*", "skip": True}],
    "steps": [
        {"transform": "shift", "on": "role:main"},
        {"transform": "range_integrate", "power": [0.0, 0.5], "on": "role:main"},
        {"solve": "gptq", "on": "role:main"},
    ],
    "calibrate": {"prompts": 1, "steps": 3},
    "search": {"prompts": 1, "steps": 1},
}


class Stopped(BaseException):
    """In the place of a kill."""


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    reelquant.quantize_folder(source, out, RECIPE)
    return contents(out)


@pytest.fixture(scope="module", params=["write_component", "copy_others"] if ALL else ["copy_others"])
def interrupted(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of a run that was stopped before, and while, its result was written."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, request.param, lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            reelquant.quantize_folder(source, out, RECIPE)
    return out.with_name("out.partial")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in files_of(folder) if file.name != REPORT}


@pytest.mark.parametrize("seed", range(60 if ALL else 3))
def test_a_damaged_journal_changes_nothing(interrupted: Path, source: Path, whole: dict[str, bytes], tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    work = Path(shutil.copytree(interrupted, tmp_path / "out.partial"))
    kinds: dict[str, list[Path]] = {}
    for file in files_of(work):
        if file.name != "lock":
            kinds.setdefault(file.name if file.parent == work else str(file.relative_to(work).parts[1:4]), []).append(file)
    file = dice.choice(kinds[sorted(kinds)[seed % len(kinds)]])
    dice.choice(DAMAGES)(file, dice) if file.stat().st_size else file.unlink()
    if file.name == "work.json" and not file.exists():  # whose folder this is cannot be told
        with pytest.raises(CheckpointError, match="not a working folder"):
            reelquant.quantize_folder(source, tmp_path / "out", RECIPE, force=True)
        return
    if file.name == "work.json":
        with suppress(CheckpointError):
            reelquant.quantize_folder(source, tmp_path / "out", RECIPE, resume=True)
    if not (tmp_path / "out").exists():
        reelquant.quantize_folder(source, tmp_path / "out", RECIPE, resume=True, force=file.name == "work.json")
    assert contents(tmp_path / "out") == whole


def test_a_log_that_is_gone_is_sampled_again(interrupted: Path, source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    work = Path(shutil.copytree(interrupted, tmp_path / "out.partial"))
    for file in (*work.glob("work/*/journal/seen/*.inputs"), *work.glob("work/*/final/*/*.safetensors")):
        file.unlink()
    reelquant.quantize_folder(source, tmp_path / "out", RECIPE, resume=True)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("content", ["{", "[]", "null", "{}", '{"reelquant": []}', "[" * 5000])
def test_a_broken_work_json_is_one_sentence(source: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "work.json").write_text(content)
    if content != "{}":  # nothing: work that was being given up
        with pytest.raises(CheckpointError, match=r"work.json|begun with another"):
            reelquant.quantize_folder(source, tmp_path / "out", "w8a16", resume=True)
    reelquant.quantize_folder(source, tmp_path / "out", "w8a16", force=True)
    assert reelquant.verify(tmp_path / "out").files
