"""Commands that are killed at a random moment of their writing, and started again."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import reelquant
from tests import processes
from tests.attack.outcomes import RawError, SilentError, snapshot

SHORT = ("--set", "calibrate.prompts=1", "--set", "calibrate.steps=2", "--set", "search.prompts=1", "--set", "search.steps=1")
KINDS: dict[str, tuple[str, ...]] = {
    "quantize": ("quantize", "FLOAT", "-r", "w8a16", "-o", "OUT", "--force"),
    "calibrate": ("quantize", "FLOAT", "-r", "minmax-w8a8", "-o", "OUT", "--resume", "--force", *SHORT),
    "evaluate": (
        "evaluate",
        "QUANTIZED",
        "--reference",
        "FLOAT",
        "-n",
        "2",
        "--steps",
        "2",
        "-m",
        "psnr",
        "--floor",
        "none",
        "-o",
        "OUT",
        "--resume",
    ),
    "export": ("export", "QUANTIZED", "-f", "torchao", "-o", "OUT", "--force"),
    "drop-blocks": ("drop-blocks", "FLOAT", "-o", "OUT", "--steps", "2", "--calls", "8", "--iterations", "70", "--force"),
    "sensitivity": ("sensitivity", "FLOAT", "-o", "OUT", "--steps", "2", "--clips", "1", "--measure", "trajectory", "--inputs", "none"),
}
"""Each can be given again after a kill."""
GROWS = ("evaluate", "sensitivity")
"""Whose output is filled bit by bit, and is not whole before the end."""
VARIES = ("report.json", "report.html", "summary.md", "reelquant-checksums.json", "SHA256SUMS", "measured.jsonl")
"""Hold timings, or sums of what does; a list of sums has a line more after a kill."""


@dataclass(frozen=True)
class Killer:
    """What is killed.

    Attributes:
        source: the float pipeline.
        quantized: a quantized one.
        places: the folder of the outputs that nothing interrupted, by kind.
        whole: by kind, the content of these outputs.
        seconds: by kind, how long writing takes, from the first file to the end.
    """

    source: Path
    quantized: Path
    places: Path
    whole: dict[str, dict[str, str]]
    seconds: dict[str, float]

    @classmethod
    def prepared(cls, source: Path, quantized: Path, folder: Path, kinds: tuple[str, ...] = tuple(KINDS)) -> Killer:
        """Every kind of command once, undisturbed, in ``folder``."""
        made = cls(source, quantized, folder, {}, {})
        for kind in kinds:
            place = folder / kind
            place.mkdir()
            made.seconds[kind] = made._run(kind, place, kill=lambda _: False)
            made.whole[kind] = _result(place / "out")
        return made

    def killed(self, seed: int, folder: Path) -> None:
        """Start a command in ``folder``, kill it, look at what is there, start it again.

        Raises:
            SilentError: if the output is not whole after the kill, the second run ends with other bytes, or something is left.
            RawError: if the second run fails.
        """
        kind, dice = list(self.whole)[seed % len(self.whole)], random.Random(seed)
        moment = dice.uniform(0, self.seconds[kind])
        if kind not in GROWS and dice.random() < 0.5:  # something is there to be replaced
            shutil.copytree(self.places / kind / "out", folder / "out")
        self._run(kind, folder, kill=lambda since: since >= moment)
        if kind not in GROWS and (folder / "out").exists() and _result(folder / "out") != self.whole[kind]:
            raise SilentError(f"{kind} killed after {moment:.3f} s: the output is not whole")
        self._run(kind, folder, kill=lambda _: False)
        if left := sorted(path.name for path in folder.iterdir() if path.name not in ("out", "said.txt")):
            raise SilentError(f"{kind} killed after {moment:.3f} s: {left[0]} is left")
        if differs := sorted(_result(folder / "out").items() ^ self.whole[kind].items()):
            raise SilentError(f"{kind} killed after {moment:.3f} s: another {differs[0][0]}")
        if kind in ("quantize", "calibrate"):
            reelquant.verify(folder / "out")

    def _run(self, kind: str, folder: Path, kill: Callable[[float], bool]) -> float:
        """Seconds from the first file on."""
        places = {"FLOAT": self.source, "QUANTIZED": self.quantized, "OUT": folder / "out"}
        process = processes.reelquant([places.get(word, word) for word in KINDS[kind]], folder / "said.txt")
        there, begun = set(folder.iterdir()) | {folder / "said.txt"}, 0.0
        while process.is_alive():
            if not begun and set(folder.iterdir()) - there:
                begun = time.monotonic()
            if begun and kill(time.monotonic() - begun):
                process.kill()
                process.join()
                return 0.0
            process.join(0.002)
        if process.exitcode:
            raise RawError(f"{kind} ended with {process.exitcode}: {(folder / 'said.txt').read_text()[-300:]}")
        return time.monotonic() - (begun or time.monotonic())


def _result(folder: Path) -> dict[str, str]:
    return {name: content for name, content in snapshot(folder).items() if Path(name).name not in VARIES}
