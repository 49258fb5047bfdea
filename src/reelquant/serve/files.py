"""Small files of the page: JSON objects that are read whatever they hold, and written whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIMIT = 64_000_000  # bytes of a JSON file that is read; reports with curves of hundreds of clips have a few MB


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none, it holds something else, or it is a link or no plain file."""
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8") as opened:
            state = os.fstat(opened.fileno())
            if not stat.S_ISREG(state.st_mode) or state.st_size > LIMIT:
                return {}
            found = json.load(opened)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_object(file: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object. A reader sees the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.writing")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)
