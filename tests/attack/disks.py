"""Commands on disks that are full, in processes with few files, and with outputs that are something else already.

A disk is full for real: the system refuses the write that passes a limit (``RLIMIT_FSIZE``), wherever in a library it happens.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from reelquant.cli import app
from tests.attack.outcomes import RawError, SilentError

EVALUATE = ("evaluate", "QUANTIZED", "--reference", "FLOAT", "-n", "1", "--steps", "1", "-m", "psnr", "--floor", "none")
GENERATE = ("generate", "QUANTIZED", "-p", "a ball", "--steps", "1")
SHORT = ("--set", "calibrate.prompts=1", "--set", "calibrate.steps=1", "--set", "search.prompts=1", "--set", "search.steps=1")
COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "quantize": (("quantize", "FLOAT", "-r", "w8a16"), ""),
    "calibrate": (("quantize", "FLOAT", "-r", "minmax-w8a8", *SHORT), ""),
    "stream": (("quantize", "FLOAT", "-r", "w8a16", "--resume"), ""),
    "generate mp4": (GENERATE, ".mp4"),
    "generate gif": (GENERATE, ".gif"),
    "generate png": (GENERATE, ".png"),
    "evaluate": (EVALUATE, ""),
    "tune": (("tune", "QUANTIZED", "--steps", "4", "--clips", "1", "--record", "1", "--fail-under", "psnr=1"), ""),
    "drop-blocks": (("drop-blocks", "FLOAT", "--steps", "2", "--calls", "4", "--iterations", "1"), ""),
    "sensitivity": (("sensitivity", "FLOAT", "--steps", "1", "--clips", "1", "--formats", "int4/channel", "--inputs", "none"), ""),
    "comfyui": (("export", "QUANTIZED", "-f", "comfyui"), ".safetensors"),
    "gguf": (("export", "QUANTIZED", "-f", "gguf"), ".gguf"),
    "torchao": (("export", "QUANTIZED", "-f", "torchao"), ""),
}
"""Words of a command without its output, and the ending of that."""


# ------------------------------------------------------------------------------------------------- what is wrong with the place


@contextmanager
def _limited(kind: int, most: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def _full(size: int) -> Callable[[Path], Any]:
    return lambda out: _limited(resource.RLIMIT_FSIZE, size)


def _few_files(more: int) -> Callable[[Path], Any]:
    return lambda out: _limited(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) + more)


def _occupied(occupy: Callable[[Path, Path], object]) -> Callable[[Path], Any]:
    @contextmanager
    def made(out: Path) -> Iterator[None]:
        occupy(out, out.parent / "victim")
        yield

    return made


def _folder(out: Path, _: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")


def _below_a_file(out: Path, _: Path) -> None:
    out.parent.joinpath("deep").write_text("a file where a folder is wanted")


KEPT = {
    "stream": {"out.partial"}, "evaluate": {"out"}, "tune": {"out.tuning"}, "drop-blocks": {"out.removal"}, "sensitivity": {"out"}
}  # fmt: skip
"""What a command that fails may leave for a later run."""
WRONGS: dict[str, Callable[[Path], Any]] = {
    "full at once": _full(0),
    "full after 300 bytes": _full(300),
    "full after 5000 bytes": _full(5_000),
    "few files": _few_files(1),
    "some files": _few_files(6),
    "a file": _occupied(lambda out, victim: shutil.copyfile(victim, out)),
    "a folder of others": _occupied(_folder),
    "a link to a file": _occupied(lambda out, victim: out.symlink_to(victim)),
    "a link to nothing": _occupied(lambda out, victim: out.symlink_to(out.parent / "nowhere" / "deep")),
    "a link to itself": _occupied(lambda out, victim: out.symlink_to(out)),
    "a pipe": _occupied(lambda out, victim: os.mkfifo(out)),
    "below a file": _occupied(_below_a_file),
}
LIMITS = ("full at once", "full after 300 bytes", "full after 5000 bytes", "few files", "some files")
CASES = [(command, wrong, "") for command in COMMANDS for wrong in WRONGS] + [
    (command, wrong, "--force") for command in COMMANDS for wrong in WRONGS if wrong not in LIMITS and not command.startswith("generate")
]
"""Every command in every place; also with ``--force``, where it has that option and something is there already."""


def attack(case: tuple[str, str, str], source: Path, quantized: Path, folder: Path) -> None:
    """Give a command a wrong place in ``folder``.

    Raises:
        RawError: if it ends in something that is not a sentence of ours.
        SilentError: if it ends well without an output, fails and leaves something, or touches what lies beside its output.
    """
    command, wrong, force = case
    words, suffix = COMMANDS[command]
    (folder / "victim").write_text("years of work")
    out = folder / f"out{suffix}"
    given = out if wrong != "below a file" else folder / "deep" / out.name
    places = {"FLOAT": str(source), "QUANTIZED": str(quantized)}
    line = [*(places.get(word, word) for word in words), "-o", str(given), *force.split()]
    with WRONGS[wrong](out):
        before = set(os.listdir(folder))
        result = CliRunner().invoke(app, line)
    said = result.stderr.strip().rpartition("\n")[2]
    if result.exit_code not in (0, 1, 2) or (result.exit_code == 1 and not said.startswith("reelquant: ")) or "unexpected" in said:
        raise RawError(f"exit {result.exit_code}: {result.stderr[-300:]} {result.exception!r:.200}")
    if (folder / "victim").read_text() != "years of work":
        raise SilentError("wrote through a link")
    if wrong == "a folder of others" and not (out / "thesis.txt").exists():
        raise SilentError("replaced a folder of others")
    if result.exit_code == 0 and not _an_output(command, out):
        raise SilentError("ended well without an output")
    kept = KEPT.get(command, set())  # work that a later run goes on with
    if result.exit_code and (left := sorted(set(os.listdir(folder)) - before - kept)):
        raise SilentError(f"failed and left {left[0]}")


def compile_loops(source: Path, folder: Path) -> None:
    """Run the command that calibrates once, on a healthy disk.

    The first calibration after an installation compiles loops, which takes longer than a command may take here, and numba keeps the result
    on the disk: a full disk would make it compile them again for each command.
    """
    result = CliRunner().invoke(app, ["quantize", str(source), "-r", "minmax-w8a8", *SHORT, "-o", str(folder)])
    assert result.exit_code == 0, result.stderr


def _an_output(command: str, out: Path) -> bool:
    """Pictures are numbered."""
    return bool(list(out.parent.glob("out-*.png"))) if command == "generate png" else out.exists()
