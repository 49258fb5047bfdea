"""Disks, links, permissions and names: nothing outside of the output is touched, and every fault is one sentence."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import reelquant
from reelquant import CalibrationError, CheckpointError
from reelquant.checkpoint import beside, folder, new_folder
from reelquant.checkpoint.export import write
from reelquant.cli import app
from tests.attack import disks
from tests.attack.damage import within
from tests.attack.kills import Killer
from tests.attack.outcomes import observed
from tests.attack.sources import quantized_pipeline
from tests.grids import ALL

ROOT = Path(__file__).parents[2]


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def fails(*words: object) -> str:
    result = invoke(*words)
    assert result.exit_code in (1, 2), result.output
    assert "unexpected" not in result.stderr and "Traceback" not in result.stderr, result.stderr
    return result.stderr


# ------------------------------------------------------------------------------------------------------------------------------ links


@pytest.mark.parametrize("hard", [False, True])
def test_a_lock_that_is_a_link_truncates_nothing(source: Path, tmp_path: Path, hard: bool) -> None:
    victim = tmp_path / "thesis.txt"
    victim.write_text("years of work")
    (tmp_path / "out.partial").mkdir()
    (os.link if hard else os.symlink)(victim, tmp_path / "out.partial" / "lock")
    with pytest.raises(CheckpointError, match=r"lock"):
        reelquant.quantize_folder(source, tmp_path / "out", "w8a16", force=True)
    assert victim.read_text() == "years of work"


def test_a_lock_that_is_a_pipe_does_not_wait(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    os.mkfifo(tmp_path / "out.partial" / "lock")
    with within(), pytest.raises(CheckpointError, match="lock"):
        reelquant.quantize_folder(source, tmp_path / "out", "w8a16")


def test_work_is_not_written_through_a_link_or_into_the_folder_of_another(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link"):
        reelquant.quantize_folder(source, tmp_path / "out", "w8a16")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "out.partial").unlink()
    (tmp_path / "out.partial").mkdir()
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.raises(CheckpointError, match="another user"):
        reelquant.quantize_folder(source, tmp_path / "out", "w8a16")


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "notes.txt", "tokenizer/secret.txt"])
def test_links_that_lead_out_of_a_source_are_not_followed(copy: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text((copy / name).read_text() if (copy / name).exists() else "secret")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match="outside of the pipeline's folder"):
        reelquant.quantize_folder(copy, tmp_path / "out", "w8a16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["vae", "tokenizer", "transformer", "text_encoder/more"])
def test_folders_that_lead_out_of_a_source_are_not_followed(copy: Path, tmp_path: Path, name: str) -> None:
    if (copy / name).is_dir():
        (copy / name).rename(tmp_path / "elsewhere")
    else:
        (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")  # as of another program, with its secrets
    (copy / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"'{copy / name}' is a link to '.*elsewhere', outside of the pipeline's folder"):
        reelquant.quantize_folder(copy, tmp_path / "out", "w8a16")
    with pytest.raises(CheckpointError, match="outside of the pipeline's folder"):
        reelquant.open_pipeline(copy)
    assert not (tmp_path / "out").exists()


def test_links_of_the_cache_of_the_hub_are_followed(source: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(source, snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(file for file in snapshot.rglob("*") if file.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    reelquant.quantize_folder(snapshot, tmp_path / "out", "w8a16")
    assert reelquant.verify(tmp_path / "out").layers


@pytest.mark.parametrize("name", ["vae/more.safetensors", "text_encoder/config.json"])
def test_a_pipe_in_a_source_does_not_wait(copy: Path, name: str) -> None:
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    with within(), pytest.raises(CheckpointError, match="named pipe"):
        reelquant.open_pipeline(copy)


# ---------------------------------------------------------------------------------------------------------------- the folder that is read


def test_the_source_is_never_replaced(copy: Path) -> None:
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    inner = copy.parent
    for output in (copy, copy / ".." / "wan", inner):
        assert "is, or holds, the pipeline that is read" in fails("quantize", copy, "-r", "w8a16", "-o", output, "--force")
        with pytest.raises(CheckpointError, match="is read"):
            reelquant.quantize_folder(copy, output, "w8a16", force=True)
    pipe = reelquant.open_pipeline(copy)
    reelquant.quantize(pipe, "w8a16")
    with pytest.raises(CheckpointError, match="is read"):
        reelquant.save(pipe, copy, force=True)
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before
    again = reelquant.load(reelquant.save(pipe, inner / "out"))
    reelquant.save(again, inner / "out", force=True)  # a quantized folder may be replaced
    with pytest.raises(CheckpointError, match="is read"):
        reelquant.export(inner / "out", "torchao", inner / "out", force=True)


# --------------------------------------------------------------------------------------------------------------- killed in the middle


KILLED = """
import os, signal, sys
from pathlib import Path
from reelquant.checkpoint import beside, folder, new_folder
target, moment, swap = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if not swap:
    folder.exchange = lambda one, other: False
if moment == "between":
    real, count = Path.rename, []
    Path.rename = lambda self, other: (count.append(1), die() if len(count) == 2 else None, real(self, other))[2]
if moment == "after":
    folder.shutil.rmtree = die
with new_folder(target, force=True) as temporary:
    (temporary / "model_index.json").write_text("new")
    if moment == "writing":
        die()
"""


MOMENTS = [(moment, swap) for moment in ("writing", "between", "after") for swap in (True, False)]


@pytest.mark.parametrize(("moment", "swap"), MOMENTS if ALL else [("between", False)])
def test_a_kill_leaves_one_whole_folder_and_the_next_run_tidies_up(tmp_path: Path, moment: str, swap: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model_index.json").write_text("old")
    words = [sys.executable, "-c", KILLED, str(out), moment, str(swap)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run(words, env=environment, capture_output=True, check=False)
    assert done.returncode in (-signal.SIGKILL, 0), done.stderr
    beside.tidy(out)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert (out / "model_index.json").read_text() == ("old" if moment == "writing" or (moment == "between" and not swap) else "new")


def test_what_is_being_written_is_not_tidied_up(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as temporary:
        (temporary / "file").write_text("x")
        beside.tidy(tmp_path / "out")
        assert (temporary / "file").is_file()
        (tmp_path / ".out.thesis.partial").mkdir()  # no name of ours
    assert sorted(file.name for file in tmp_path.iterdir()) == [".out.thesis.partial", "out"]


def test_a_killed_export_leaves_nothing_for_good(tmp_path: Path) -> None:
    left = tmp_path / ".model.gguf.01234567.partial"
    left.write_text("half")
    with write.new_file(tmp_path / "model.gguf") as temporary:
        temporary.write_text("whole")
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.full
def test_kills_at_random_moments(source: Path, tmp_path: Path) -> None:
    """Whatever is there after a kill is whole, and the next run ends with the right bytes and nothing beside them."""
    (tmp_path / "whole").mkdir()
    killer = Killer.prepared(source, source, tmp_path / "whole", ("quantize",))
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        assert observed(f"kill {seed}", lambda seed=seed: killer.killed(seed, tmp_path / str(seed)), source) == []


# --------------------------------------------------------------------------------------------------- full disks, names, permissions


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_pipeline(tmp_path_factory.mktemp("quantized") / "out", ["transformer"])


@pytest.mark.parametrize("case", disks.CASES[:: 7 if ALL else 12], ids=" ".join)
def test_wrong_places(source: Path, quantized: Path, tmp_path: Path, case: tuple[str, str, str]) -> None:
    assert observed(" ".join(case), lambda: disks.attack(case, source, quantized, tmp_path), source) == []


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["store.write_text", "store.write_video", "store.save_file"])
def test_a_full_disk_in_evaluate_is_one_sentence(source: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise FULL

    out = invoke("quantize", source, "-r", "w8a16", "-o", tmp_path / "out")
    assert out.exit_code == 0, out.output
    if place == "store.write_text":
        monkeypatch.setattr("pathlib.Path.write_text", full)
    else:
        monkeypatch.setattr(f"reelquant.evidence.{place}", full)
    call = ("-n", 1, "--floor", "none", "-m", "psnr", "--steps", 1)
    words = ("evaluate", tmp_path / "out", "--reference", source, "-o", tmp_path / "proof", *call)
    assert "No space left" in fails(*words)


@pytest.mark.parametrize("format", ["comfyui", "gguf", "torchao"])
def test_an_export_into_a_place_that_takes_no_files(source: Path, tmp_path: Path, format: str) -> None:
    """A file in the place of the folder, and names that no disk takes."""
    reelquant.quantize_folder(source, tmp_path / "out", "w8a16")
    (tmp_path / "file").write_text("x")
    suffix = {"comfyui": ".safetensors", "gguf": ".gguf", "torchao": ""}[format]
    for place in (tmp_path / "file" / f"a{suffix}", tmp_path / f"{'n' * 300}{suffix}", Path("/proc") / f"a{suffix}"):
        fails("export", tmp_path / "out", "-f", format, "-o", place)
        fails("export", tmp_path / "out", "-f", format, "-o", place, "--force")


LONG = "n" * 300


@pytest.mark.parametrize(
    "words",
    [
        ("quantize", LONG, "-r", "w8a16", "-o", "out"),
        ("quantize", "MODEL", "-r", f"{LONG}.yaml", "-o", "OUT"),
        ("quantize", "MODEL", "-r", "w8a16", "-o", f"OUT{LONG}"),
        ("quantize", "MODEL", "-r", "w8a16", "-o", "OUT", "--prompts", LONG),
        ("quantize", "MODEL", "-r", "w8a16", "-o", "OUT", "--lora", f"{LONG}.safetensors"),
        ("quantize", "MODEL", "-r", "qvd-w8a8", "-o", "OUT", "--seed", 2**64),
        ("quantize", "MODEL", "-r", "qvd-w8a8", "-o", "OUT", "--set", "calibrate.seed=99999999999999999999"),
        ("generate", "MODEL", "-p", "a ball", "-o", f"OUT{LONG}.mp4"),
        ("generate", "MODEL", "-p", "a ball", "-o", "OUT.mp4", "--seed", 2**64),
        ("generate", "MODEL", "-p", "a ball", "-o", "OUT.mp4", "--guidance", "nan"),
        ("generate", "MODEL", "-p", "a ball", "-o", "OUT.mp4", "--height", 63),
        ("evaluate", "MODEL", "--reference", "MODEL", "--guidance", "inf", "-o", "OUT"),
        ("evaluate", "MODEL", "--reference", LONG, "-o", "OUT"),
        ("evaluate", "MODEL", "--reference", "MODEL", "-n", 1, "-o", f"OUT{LONG}", "--steps", 1, "--floor", "none"),
        ("compare", LONG, LONG),
        ("verify", LONG),
        ("export", LONG, "-f", "gguf", "-o", "OUT.gguf"),
        ("recipes", f"{LONG}.yaml"),
    ],
    ids=lambda words: f"{words[0]} {str(words[-1])[:12]}",
)
def test_options_that_cannot_be(source: Path, tmp_path: Path, words: tuple[object, ...]) -> None:
    given = [str(word).replace("MODEL", str(source)).replace("OUT", str(tmp_path / "out")) for word in words]
    fails(*given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"call": 3}', '{"prompts": "a"}', '{"prompts": [1]}', "[" * 9999])
def test_broken_notes_are_one_sentence(copy: Path, tmp_path: Path, content: str) -> None:
    (copy / "reelquant.json").write_text(content)
    assert "reelquant.json" in fails("generate", copy, "-p", "a ball", "-o", tmp_path / "a.mp4")


def test_a_seed_beyond_64_bits_in_python(source: Path) -> None:
    from reelquant.models.sampling import sample

    with pytest.raises(CalibrationError, match="64 bits"):
        sample(reelquant.open_pipeline(source), ["a"], seed=2**64)


def test_exchange_is_one_step_where_the_system_can(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not beside.exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this system or disk cannot exchange two paths")
    assert (tmp_path / "one" / "other").is_file() and (tmp_path / "other" / "one").is_file()
    assert folder.exchange is beside.exchange
