"""Long runs of the attacks: ``python -m tests.attack.long``, or ``make attack``. It prints a table, and ends with 1 if anything gave way.

``--only recipes kills`` runs some of them, ``--count 50`` that many of each, ``--first 1000`` from another seed on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before diffusers and transformers are imported, which read these once.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TERM": "dumb",
    "COLUMNS": "120",
}

from reelquant.cli.console import quiet_libraries, quiet_loading
from tests.attack import disks, fuzz, journals
from tests.attack.folders import refused_when_damaged
from tests.attack.kills import Killer
from tests.attack.outcomes import FAULTS, LIMIT, Finding, observed
from tests.attack.sources import float_pipeline, quantized_pipeline

Run = Callable[[int, Path], Iterable[Finding]]


@dataclass(frozen=True)
class Attack:
    """One kind.

    Attributes:
        count: cases of a whole run.
        prepare: gives the run of one case (its seed, an empty folder) from a folder with pipelines to read.
    """

    count: int
    prepare: Callable[[Path], Run]


def _recipes(folder: Path) -> Run:
    target = fuzz.target()
    return lambda seed, work: observed(f"recipe {seed}", lambda: fuzz.planned(fuzz.fuzzed(seed, work), target))


def _folders(folder: Path) -> Run:
    saved = quantized_pipeline(folder / "quantized")

    def run(seed: int, work: Path) -> Iterable[Finding]:
        copy = Path(shutil.copytree(saved, work / "out"))
        return observed(f"folder {seed}", lambda: refused_when_damaged(copy, seed), saved)

    return run


def _kills(folder: Path) -> Run:
    inputs, first = folder / "inputs", folder / "first"
    first.mkdir(parents=True)
    killer = Killer.prepared(float_pipeline(inputs / "wan"), quantized_pipeline(inputs / "quantized", ["transformer"]), first)
    return lambda seed, work: observed(f"kill {seed}", lambda: killer.killed(seed, work), inputs)


def _disks(folder: Path) -> Run:
    source, quantized = float_pipeline(folder / "wan"), quantized_pipeline(folder / "quantized", ["transformer"])

    def run(seed: int, work: Path) -> Iterable[Finding]:
        case = disks.CASES[seed % len(disks.CASES)]
        return observed(f"disk {seed}: {case}", lambda: disks.attack(case, source, quantized, work), folder)

    return run


def _journals(folder: Path) -> Run:
    source = float_pipeline(folder / "wan")
    whole = journals.whole(source, folder / "whole")
    works = [journals.stopped(source, folder / moment, moment) for moment in journals.MOMENTS]
    runs = [journals.Interrupted(source, work, whole) for work in works]
    return lambda seed, work: observed(f"journal {seed}", lambda: runs[seed % 2].damaged(seed // 2, work), folder, LIMIT)


ATTACKS = {
    "recipes": Attack(1000, _recipes),
    "folders": Attack(500, _folders),
    "kills": Attack(50, _kills),
    "disks": Attack(len(disks.CASES), _disks),
    "journals": Attack(120, _journals),
}


def main(words: list[str] | None = None) -> int:
    """The exit code."""
    options = _options(words)
    quiet_libraries()
    quiet_loading()
    found: dict[str, list[Finding]] = {}
    rows = {}
    for name in options.only:
        attack, start = ATTACKS[name], time.monotonic()
        count = options.count or attack.count
        found[name] = list(_all(attack, range(options.first, options.first + count)))
        rows[name] = (count, Counter(one.fault for one in found[name]), time.monotonic() - start)
        for one in found[name]:
            say(f"{one.fault}: {one.case}: {one.detail!a}")
    say(f"{'attack':10}{'cases':>8}" + "".join(f"{fault:>12}" for fault in FAULTS) + f"{'seconds':>10}")
    for name, (count, faults, seconds) in rows.items():
        say(f"{name:10}{count:8}" + "".join(f"{faults[fault]:12}" for fault in FAULTS) + f"{seconds:10.0f}")
    return int(any(found.values()))


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _options(words: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m tests.attack.long", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--count", type=int, default=0, help="cases of each; by default all")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    return parser.parse_args(words)


def _all(attack: Attack, seeds: Iterable[int]) -> Iterable[Finding]:
    with tempfile.TemporaryDirectory() as place:
        disks.compile_loops(float_pipeline(Path(place) / "compiled" / "wan"), Path(place) / "compiled" / "out")
        run = attack.prepare(Path(place) / "read")
        for seed in seeds:
            work = Path(place) / "work" / str(seed)
            work.mkdir(parents=True)
            yield from run(seed, work)
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
