"""One process against several, and one of several killed: ``python -m benchmarks.ranks --ranks 2 --rounds 2``.

Quantizes and evaluates a bundled pipeline by the command line, every process with one thread, once with one process and once with several
that are started as torchrun starts them, in turns. Then it kills one of several half-way through calibration and starts the command again.
Compared are the bytes of everything but what holds timings. Seconds are of the wall, from the first process to the end of the last, the
start of the interpreters included.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from reelquant.evidence.machine import machine

RESULTS = Path(__file__).with_name("results")
VARIES = ("report.json", "report.html", "summary.md", "reelquant-checksums.json", "SHA256SUMS")
"""Files with timings, with sums of those, or with a line more after a kill."""
LOST = 10.0  # seconds without a sign of life, until a process counts as lost


def port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def start(words: Sequence[object], ranks: int) -> list[subprocess.Popen[bytes]]:
    """The processes of a command, each with one thread."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "OMP_NUM_THREADS": "1", "REELQUANT_RANK_TIMEOUT": str(LOST)}
    started = []
    for number in range(ranks):
        own = {"RANK": str(number), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(number)} if ranks > 1 else {}
        command = [sys.executable, "-m", "reelquant", *(str(word) for word in words)]
        started.append(subprocess.Popen(command, env=os.environ | place | own, stdout=subprocess.DEVNULL))
    return started


def seconds(words: Sequence[object], ranks: int, kill: Callable[[], bool] | None = None) -> float:
    """Run a command to its end; ``kill`` says when its last process is killed, and then the others have to fail."""
    began, started = time.perf_counter(), start(words, ranks)
    while kill is not None and not kill():
        if started[-1].poll() is not None:
            raise RuntimeError("the command ended before it could be killed")
        time.sleep(0.01)
    if kill is not None:
        started[-1].kill()
    codes = [process.wait() for process in started]
    if (kill is None) != (not any(codes)):
        raise RuntimeError(f"the processes ended with {codes}")
    return time.perf_counter() - began


def digest(folder: Path) -> str:
    """The sum of all files that two runs have in common."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name not in VARIES:
            found.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-dit")
    parser.add_argument("--recipe", default="qvd-w8a8")
    parser.add_argument("--prompts", type=int, default=16, help="calibration texts; runs of the sampler take a quarter each, at most 4")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="a sentence about the machine for the results page")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        rows = measured(Path(folder), options)
    write(rows, options)


def measured(folder: Path, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Rows: what, processes, median seconds, times as fast, same bytes."""
    given = ("--set", f"calibrate.prompts={options.prompts}", "--set", f"calibrate.steps={options.steps}")
    quantize = ("quantize", options.model, "-r", options.recipe, *given, "-o")
    evaluate = ("evaluate", folder / "quantize-1", "--reference", options.model, "-n", options.clips, "--steps", options.steps)
    works = {"quantize": quantize, "evaluate": (*evaluate, "-m", "psnr", "--floor", "bf16", "-o")}
    rows = []
    for name, words in works.items():
        spent: dict[int, list[float]] = {1: [], options.ranks: []}
        same = True
        for turn in range(options.rounds):
            for ranks in (1, options.ranks) if turn % 2 == 0 else (options.ranks, 1):
                out = folder / f"{name}-{ranks}"
                spent[ranks].append(seconds((*words, out, "--force"), ranks))
                same = same and digest(out) == digest(folder / f"{name}-1") if (folder / f"{name}-1").is_dir() else same
        ratio = statistics.median(one / several for one, several in zip(spent[1], spent[options.ranks], strict=True))
        rows.append((name, "1", f"{statistics.median(spent[1]):.1f}", "1.00", ""))
        rows.append((name, str(options.ranks), f"{statistics.median(spent[options.ranks]):.1f}", f"{ratio:.2f}", "yes" if same else "NO"))
    out = folder / "killed"
    seconds((*quantize, out), options.ranks, kill=lambda: any(folder.glob("killed.ranks/*-calibrate/000001")))
    left = [place.name for place in sorted(folder.glob("killed.ranks/*-calibrate/*")) if not place.name.startswith(".")]
    again = seconds((*quantize, out), options.ranks)
    same = digest(out) == digest(folder / "quantize-1")
    name = f"quantize again, one of them was killed when {len(left)} runs of calibration were done"
    rows.append((name, str(options.ranks), f"{again:.1f}", "", "yes" if same else "NO"))
    shutil.rmtree(out)
    return rows


def write(rows: list[tuple[str, ...]], options: argparse.Namespace) -> None:
    here = machine()
    lines = [
        "# One process against several",
        "",
        f"Made by `python -m benchmarks.ranks --model {options.model} --recipe {options.recipe} --prompts {options.prompts} --steps "
        f"{options.steps} --clips {options.clips} --ranks {options.ranks} --rounds {options.rounds}`; see docs/ranks.md.",
        f"{here.get('processor') or here.get('cpu') or 'a processor'}, one thread a process, no GPU. {options.note}".rstrip(),
        "",
        "| work | processes | seconds, median | times as fast, median of pairs | the bytes of one process |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    (RESULTS / "ranks.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
