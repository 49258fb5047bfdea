"""Frames of tensors appended to a file, and short names for content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

_HEAD = 16  # bytes before a frame: number of the call, length of the frame


class Log:
    """Frames appended to a file, each with the number of the denoiser call it belongs to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, call: int, seen: Mapping[str, Tensor]) -> None:
        """Add a frame."""
        content = save({name: value.contiguous() for name, value in seen.items()})
        with self.path.open("ab") as file:
            file.write(call.to_bytes(8, "little") + len(content).to_bytes(8, "little") + content)

    def frames(self, after: int = -1) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The frames of calls behind ``after``, in order."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            while head := file.read(_HEAD):
                call, length = int.from_bytes(head[:8], "little"), int.from_bytes(head[8:], "little")
                if call <= after:
                    file.seek(length, 1)
                else:
                    yield call, load(file.read(length))

    def cut(self, calls: int) -> None:
        """Keep the frames of the first ``calls`` calls; frames that a killed process wrote behind them go."""
        if not self.path.exists():
            return
        end = 0
        with self.path.open("r+b") as file:
            while len(head := file.read(_HEAD)) == _HEAD and int.from_bytes(head[:8], "little") < calls:
                end = file.seek(int.from_bytes(head[8:], "little"), 1)
            file.truncate(end)

    def clear(self) -> None:
        """Drop all frames."""
        self.path.write_bytes(b"")


def digest(*content: Any) -> str:
    """A short name for whatever decides a result."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
