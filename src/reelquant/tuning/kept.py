"""Figures that were measured, kept on disk as they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reelquant.checkpoint import keeping_work


class KeptFigures:
    """What was measured, in a file of a line each: a run that was stopped goes on where it was.

    Args:
        file: of the lines.
        settings: what a line has to agree with, as plain data.
        key: what a line is about: the name of its field.
        value: the name of the field with the figure, a number or a list of them.
    """

    def __init__(self, file: Path, settings: Any, key: str, value: str) -> None:
        self.file, self.settings, self.key, self.value = file, json.dumps(settings, default=str), key, value
        self.found: dict[Any, Any] = {}
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if row.get("settings") == self.settings:
                self.found[row[key]] = row[value]

    def of(self, key: Any) -> Any:
        """What an earlier run measured, or None."""
        return self.found.get(key)

    def keep(self, key: Any, value: Any) -> None:
        """Note what was measured."""
        self.found[key] = value
        with keeping_work(self.file.parent):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps({"settings": self.settings, self.key: key, self.value: value}) + "\n")
