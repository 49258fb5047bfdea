"""The working folder of a stopped run with one file damaged: the run that goes on ends with the same bytes, or in a sentence."""

from __future__ import annotations

import random
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

import reelquant
from reelquant import CheckpointError
from reelquant.models.manifest import REPORT
from reelquant.streaming import run
from tests.attack.damage import DAMAGES, files_of
from tests.attack.outcomes import SilentError

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
MOMENTS = ("copy_others", "write_component")  # functions of reelquant.streaming.run at which a run is stopped


class Stopped(BaseException):
    """In the place of a kill."""


@dataclass(frozen=True)
class Interrupted:
    """A run that was stopped.

    Attributes:
        source: the float pipeline.
        work: its working folder.
        whole: the files of a run that nothing interrupts.
    """

    source: Path
    work: Path
    whole: dict[str, bytes]

    def damaged(self, seed: int, folder: Path) -> None:
        """Damage a copy in ``folder`` and go on.

        Raises:
            SilentError: if the result has other bytes.
        """
        dice, out = random.Random(seed), folder / "out"
        work = Path(shutil.copytree(self.work, folder / "out.partial"))
        file = _chosen(work, seed, dice)
        dice.choice(DAMAGES)(file, dice) if file.stat().st_size else file.unlink()
        named = file.name == "work.json"
        if named and not file.exists():  # whose folder this is cannot be told
            try:
                reelquant.quantize_folder(self.source, out, RECIPE, force=True)
            except CheckpointError as error:
                if "not a working folder" in str(error):
                    return
                raise
            raise SilentError("went on without work.json")
        if named:
            with suppress(CheckpointError):
                reelquant.quantize_folder(self.source, out, RECIPE, resume=True)
        if not out.exists():
            reelquant.quantize_folder(self.source, out, RECIPE, resume=True, force=named)
        if contents(out) != self.whole:
            raise SilentError(f"other bytes after damage to {file.relative_to(work)}")


def _chosen(work: Path, seed: int, dice: random.Random) -> Path:
    """Every kind of file in its turn."""
    kinds: dict[str, list[Path]] = {}
    for file in files_of(work):
        if file.name != "lock":
            kinds.setdefault(file.name if file.parent == work else str(file.relative_to(work).parts[1:4]), []).append(file)
    return dice.choice(kinds[sorted(kinds)[seed % len(kinds)]])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in files_of(folder) if file.name != REPORT}


def whole(source: Path, folder: Path) -> dict[str, bytes]:
    """The files of a run that nothing interrupts."""
    reelquant.quantize_folder(source, folder / "out", RECIPE)
    return contents(folder / "out")


def stopped(source: Path, folder: Path, moment: str) -> Path:
    """The working folder of a run that was stopped when it came to a function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, moment, lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            reelquant.quantize_folder(source, folder / "out", RECIPE)
    return folder / "out.partial"
