"""Ways to damage a folder, each decided by a random generator, so that a seed gives the same damage every time."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 5.0  # no attack may keep a command busy for longer


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def flip(file: Path, dice: random.Random) -> None:
    """Another value in one byte."""
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def zero(file: Path, dice: random.Random) -> None:
    """A run of zeros, as a disk leaves them that lost a page."""
    content = bytearray(file.read_bytes())
    start = dice.randrange(len(content))
    end = min(len(content), start + dice.randrange(1, 4096))
    content[start:end] = bytes(end - start)
    if bytes(content) == file.read_bytes():  # they were zeros before
        content[start] = 1
    file.write_bytes(content)


def cut(file: Path, dice: random.Random) -> None:
    """The end is missing."""
    content = file.read_bytes()
    file.write_bytes(content[: dice.randrange(len(content))])


def lengthen(file: Path, dice: random.Random) -> None:
    """Bytes behind the end."""
    with file.open("ab") as opened:
        opened.write(dice.randbytes(dice.randrange(1, 64)))


def remove(file: Path, dice: random.Random) -> None:
    file.unlink()


def retype(file: Path, dice: random.Random) -> None:
    """JSON with a value of another kind somewhere; other files get a flipped byte."""
    content = json.loads(file.read_text()) if file.suffix == ".json" else None
    if not isinstance(content, dict | list):
        return flip(file, dice)
    node: Any = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return lengthen(file, dice)
        key = dice.choice(keys)
        if not isinstance(node[key], dict | list) or not node[key] or dice.random() < 0.3:
            break
        node = node[key]
    node[key] = dice.choice([other for other in (None, -1, 1.5, "x", [], {}, [[]], True, 10**30) if other != node[key]])
    file.write_text(json.dumps(content))
    return None


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (flip, zero, cut, lengthen, remove, retype)


@contextmanager
def within(seconds: float = SECONDS) -> Iterator[None]:
    """The block takes no longer than this; processor time is counted, as tests share the machine."""
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds
