"""What one attack came to, in the four kinds of faults that there must be none of."""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.attack.damage import SECONDS

FAULTS = ("raw error", "hang", "silent", "outside")
LIMIT = 60  # seconds by the clock after which something waits for ever; processor time has the lower limit SECONDS


class SilentError(Exception):
    """Raised by an attack: what should have been refused was accepted, or a result is wrong and nothing said so."""


class RawError(Exception):
    """Raised by an attack: a command ended in something that is not one sentence of ours."""


class _Waits(BaseException):
    """Not an Exception, so that what is attacked does not take it for one of its own."""


@dataclass(frozen=True)
class Finding:
    """A fault.

    Attributes:
        fault: one of :data:`FAULTS`.
        case: what was done.
        detail: how it ended.
    """

    fault: str
    case: str
    detail: str


def observed(case: str, attack: Callable[[], Any], outside: Path | None = None, seconds: float = SECONDS) -> list[Finding]:
    """Run an attack.

    Args:
        case: how a finding names it.
        attack: returns if all is well; raises :class:`SilentError`, :class:`RawError`, or whatever got out of the library.
        outside: a folder in which nothing may change.
        seconds: of processor time that it may take.
    """
    before, start, found = snapshot(outside), time.process_time(), []
    previous = signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(LIMIT)
    try:
        attack()
    except _Waits:
        found.append(Finding("hang", case, f"waited for {LIMIT} s"))
    except SilentError as error:
        found.append(Finding("silent", case, str(error)))
    except Exception as error:
        found.append(Finding("raw error", case, f"{type(error).__name__}: {error}"[:400]))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    if (took := time.process_time() - start) > seconds:
        found.append(Finding("hang", case, f"{took:.1f} s of processor time"))
    if changed := sorted(before.items() ^ snapshot(outside).items()):
        found.append(Finding("outside", case, f"changed: {changed[0][0]}"))
    return found


def _give_up(*_: Any) -> None:
    raise _Waits


def snapshot(folder: Path | None) -> dict[str, str]:
    """Every file, link and folder with its content."""
    return {} if folder is None else {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*"))}


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
