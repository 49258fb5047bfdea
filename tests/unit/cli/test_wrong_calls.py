"""Wrong calls: one sentence, before anything slow begins, and nothing is left behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from typer.testing import CliRunner

from reelquant import CalibrationError, CheckpointError, RecipeError
from reelquant.checkpoint import check_folder, keeping_work
from reelquant.checkpoint.folder import remove
from reelquant.cli import VERBS, app
from reelquant.cli.errors import one_line
from reelquant.cli.options import ALLOCATORS
from reelquant.evidence.gate import parse_limits
from reelquant.evidence.store import RUN, Store
from reelquant.removal.distill import Distillation
from tests.tiny.stock import stored_pipeline


def floats() -> Iterator[tuple[str, str]]:
    """Verbs and their options that take numbers with fractions."""
    for verb in VERBS:
        for hint in get_type_hints(verb, include_extras=True).values():
            kind, *more = get_args(hint) or (hint,)
            if more and float in (kind, *get_args(kind)):
                yield (
                    verb.__name__.replace("_", "-"),
                    next(word for word in (more[0].default, *more[0].param_decls) if word.startswith("--")),
                )


FLOATS = sorted(floats())
SHORT = ("--steps", "6", "--frames", "5", "--height", "32", "--width", "32")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float pipeline, ``wan``, and a quantized one, ``out``."""
    folder = tmp_path_factory.mktemp("places")
    stored_pipeline(folder / "wan")
    (folder / "file.txt").write_text("a ball\n")
    (folder / "empty").mkdir()
    assert CliRunner().invoke(app, ["quantize", str(folder / "wan"), "-r", "w8a16", "-o", str(folder / "out")]).exit_code == 0
    return folder


def refused(places: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What is said of a call that leaves the folder as it was."""
    monkeypatch.chdir(places)
    before = sorted(places.rglob("*"))
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code in (1, 2), result.output
    assert "unexpected" not in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert sorted(places.rglob("*")) == before
    return " ".join(result.stderr.replace("│", " ").split())


def test_there_are_options_that_take_numbers() -> None:
    assert {("tune", "--max-lpips"), ("drop-blocks", "--rate"), ("sensitivity", "--bits"), ("generate", "--guidance")} <= set(FLOATS)


@pytest.mark.parametrize(("verb", "option"), FLOATS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_of_options_are_finite(places: Path, monkeypatch: pytest.MonkeyPatch, verb: str, option: str, value: str) -> None:
    needed = {"plan": ["--max-memory", "1GB"], "generate": ["-p", "x"], "quantize": ["-r", "w8a16"]}.get(verb, [])
    output = ["-o", "new.mp4" if verb == "generate" else "new"] if verb != "benchmark" else []
    assert option in refused(places, monkeypatch, verb, "wan", *needed, *output, f"{option}={value}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tune", "out", "-o", "new", "--weights", "nowhere", *SHORT), "no folder of weights at 'nowhere'"),
        (("tune", "out", "-o", "new", "--fail-under", "psnr=nan", *SHORT), "a limit is finite, got nan"),
        (("drop-blocks", "wan", "-o", "new", "--blocks", "1,1", *SHORT), "each once and not all of them, got [1, 1]"),
        (("drop-blocks", "wan", "-o", "new", "--seed", "9" * 30, *SHORT), "--seed"),
        (("sensitivity", "wan", "-o", "file.txt", *SHORT), "is a file; give a folder"),
        (("plan", "wan", "--max-memory", "1GB", "--recipes", ","), "--recipes names none"),
        (("plan", "wan", "--max-memory", "1GB", "--map", "file.txt"), "--map: 'file.txt' is a file"),
        (("evaluate", "out", "--fail-under", "psnr=inf", "-o", "new", *SHORT), "a limit is finite, got inf"),
        (("evaluate", "out", "--reuse", "empty", "-o", "new", *SHORT), "no evaluation in 'empty'"),
    ],
    ids=lambda value: " ".join(value[:5]) if isinstance(value, tuple) else None,
)
def test_what_is_wrong_is_said_at_once(places: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str) -> None:
    def slow(*_: Any, **__: Any) -> Any:
        raise AssertionError("sampling has begun")

    monkeypatch.setattr("reelquant.models.sampling.sample", slow)
    for module in ("reelquant.evidence.sampling", "reelquant.tuning.recording", "reelquant.removal.distill"):
        monkeypatch.setattr(f"{module}.sample", slow)
    assert said in refused(places, monkeypatch, *words)


def test_methods_of_allocation_are_completed_by_their_names() -> None:
    from reelquant.allocate import METHODS

    assert ALLOCATORS("") == list(METHODS)


@pytest.mark.parametrize("how", [{"rate": float("nan")}, {"rate": float("inf")}, {"motion": float("inf")}, {"motion": -1.0}])
def test_a_distillation_takes_finite_numbers(how: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="a finite rate > 0 and a finite motion >= 0"):
        Distillation(**how)


def test_limits_are_finite() -> None:
    with pytest.raises(RecipeError, match="--fail-under psnr: a limit is finite, got nan"):
        parse_limits({"psnr": float("nan")})


# ------------------------------------------------------------------------------------------------------------------ what is left


def test_an_evaluation_in_which_nothing_was_made_leaves_no_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "proof")
    store.begin({"kind": "evaluate"}, resume=False, force=False)
    store.leave()
    assert not store.root.exists()
    store.begin({"kind": "evaluate"}, resume=False, force=False)
    store.add("test", {"name": "0000", "sources": [], "figures": {}, "curves": {}})
    store.leave()
    assert (store.root / RUN).is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    Store(tmp_path / "mine").leave()
    assert (tmp_path / "mine" / "thesis.txt").is_file()


def test_an_evaluation_of_a_float_pipeline_that_is_broken_can_be_repeated_with_another(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise CalibrationError("the weight of layer 'x' holds NaN or inf")

    monkeypatch.setattr("reelquant.evidence.sampling.open_pipeline", broken)
    words = ["evaluate", str(places / "out"), "--reference", str(places / "wan"), "-n", "1", "-o", str(tmp_path / "proof"), *SHORT]
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.stderr) == (1, "reelquant: the weight of layer 'x' holds NaN or inf\n")
    assert not (tmp_path / "proof").exists()


def test_work_on_a_full_disk_says_where_it_is(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    for error in (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("No space left on device")):
        with (
            pytest.raises(CheckpointError, match=r"cannot write '.*': .*No space left.*what is done is kept there"),
            keeping_work(tmp_path),
        ):
            raise error
    with pytest.raises(CheckpointError, match=r"^mine$"), keeping_work(tmp_path):
        raise CheckpointError("mine")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(f"unable to open file <x> in read-only mode: {os.strerror(errno.EMFILE)} (24)"), "ulimit -n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "free space on the disk"),
        (RuntimeError("something else"), "unexpected RuntimeError"),
    ],
)
def test_what_a_system_runs_out_of_is_not_unexpected(error: Exception, said: str) -> None:
    line = one_line(error)
    assert said in line and ("unexpected" in line) == ("unexpected" in said)


def test_a_folder_is_removed_where_hardly_any_file_can_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, kept = tmp_path / "whole", tmp_path / "kept"
    (whole / "a" / "b").mkdir(parents=True)
    kept.mkdir()
    for file in (whole / "file", whole / "a" / "b" / "file", kept / "file"):
        file.touch()
    (whole / "a" / "link").symlink_to(kept)
    monkeypatch.setattr("reelquant.checkpoint.folder.shutil.rmtree", lambda *_, **__: None)  # has found no handle for the next level
    remove(whole)
    assert not whole.exists() and (kept / "file").is_file()


def test_a_folder_that_files_are_added_to_is_a_folder(tmp_path: Path) -> None:
    check_folder(tmp_path)
    check_folder(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file; give a folder"):
        check_folder(tmp_path / "file")
