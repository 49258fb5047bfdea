"""Frames of tensors appended to a file, and short names for content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from reelquant._errors import CheckpointError

_HEAD = 16  # bytes before a frame: number of the call, length of the frame
TORN = 2**63  # instead of the number of a call
_SUM = 16  # bytes of the sum behind that: of both and of the frame


class Log:
    """Frames appended to a file, each with the number of the denoiser call it belongs to, and with a sum."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, call: int, seen: Mapping[str, Tensor]) -> None:
        """Add a frame."""
        content = save({name: value.contiguous() for name, value in seen.items()})
        head = call.to_bytes(8, "little") + len(content).to_bytes(8, "little")
        with self.path.open("ab") as file:
            file.write(head + _sum(head, content) + content)

    def frames(self, after: int = -1) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The frames of calls behind ``after``, in order.

        Raises:
            CheckpointError: at the first that is not what was written.
        """
        for call, content, _ in self._whole():
            if content is None:
                raise CheckpointError(f"'{self.path}' is damaged; go on with resume=True (--resume), and it is made again")
            if call > after:
                yield call, load(content)

    def cut(self, calls: int, after: int = -1) -> int | None:
        """Keep the frames of the first ``calls`` calls; frames that a killed process wrote behind them go.

        Returns:
            How many of those kept belong to calls behind ``after``; None if one of them is not what was written.
        """
        count, end = 0, 0
        for call, content, place in self._whole():
            if content is None and call < calls:
                return None
            if content is None or call >= calls:
                break
            count, end = count + (call > after), place
        if self.path.exists():
            os.truncate(self.path, end)
        return count

    def _whole(self) -> Iterator[tuple[int, bytes | None, int]]:
        """Number of the call, content and end of every frame; the content is None where it is damaged, and nothing follows."""
        if not self.path.exists():
            return
        size = self.bytes
        with self.path.open("rb") as file:
            while head := file.read(_HEAD + _SUM):
                call, length = int.from_bytes(head[:8], "little"), int.from_bytes(head[8:_HEAD], "little")
                if len(head) < _HEAD + _SUM:  # of a call that a killed process was making
                    call, length = TORN, 0
                content = file.read(length) if length <= size else b""
                if call == TORN or _sum(head[:_HEAD], content) != head[_HEAD:]:
                    yield call, None, size
                    return
                yield call, content, file.tell()

    def clear(self) -> None:
        """Drop all frames."""
        self.path.write_bytes(b"")


def _sum(head: bytes, content: bytes) -> bytes:
    found = hashlib.blake2b(head, digest_size=_SUM)
    found.update(content)
    return found.digest()


def digest(*content: Any) -> str:
    """A short name for whatever decides a result."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
