"""What a run has measured, in a file of a line each: a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reelquant._errors import CheckpointError

FILE = "measured.jsonl"


class Kept:
    """Measured numbers by the name of what was measured.

    Args:
        folder: where the file is; None keeps everything in memory.
        settings: what a line has to agree with to be used.
    """

    def __init__(self, folder: Path | None, settings: Any) -> None:
        self.file = None if folder is None else folder / FILE
        self.settings = json.dumps(settings, default=str, sort_keys=True)
        self.found: dict[str, list[float]] = {}
        self.seconds: dict[str, float] = {}
        for line in self._lines():
            try:
                row = json.loads(line)
                if row["settings"] == self.settings:
                    self._note(str(row["name"]), [float(one) for one in row["values"]], float(row["seconds"]))
            except (ValueError, KeyError, TypeError):  # the last line of a run that was killed
                continue

    def _lines(self) -> list[str]:
        if self.file is None or not self.file.is_file():
            return []
        return self.file.read_text(encoding="utf-8").splitlines()

    def _note(self, name: str, values: list[float], seconds: float) -> None:
        self.found[name], self.seconds[name] = values, seconds

    def spent(self, start: str) -> float:
        """Processor seconds that everything took whose name begins so, in this run and in those before."""
        return sum(seconds for name, seconds in self.seconds.items() if name.startswith(start))

    def of(self, name: str, measure: Callable[[], Sequence[float]]) -> list[float]:
        """What is known under a name; measured and noted if nothing is.

        Raises:
            CheckpointError: if it cannot be noted.
        """
        if name not in self.found:
            began = time.process_time()
            values = [float(one) for one in measure()]
            self._note(name, values, time.process_time() - began)
            self._append({"name": name, "values": values, "seconds": round(self.seconds[name], 4), "settings": self.settings})
        return self.found[name]

    def _append(self, row: dict[str, Any]) -> None:
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            begun = self.file.is_file() and self.file.read_bytes()[-1:] not in (b"", b"\n")  # a line that a kill cut short
            with self.file.open("a", encoding="utf-8") as opened:
                opened.write(("\n" if begun else "") + json.dumps(row) + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write '{self.file}': {error.strerror}; free space and run again, it goes on") from None
