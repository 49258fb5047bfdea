"""Ctrl-C and SIGTERM: both unwind the stack, and neither is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

TERMINATED = 143


class Terminated(SystemExit):
    """SIGTERM: unwinds the stack like Ctrl-C, so that half-written files are removed. ``where`` says what is kept."""

    def __init__(self, where: str = "") -> None:
        super().__init__(TERMINATED)
        self.where = where


@contextmanager
def keeping(words: Callable[[], str]) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM say what is kept and how to go on, unless something further inside said so; no words for nothing."""
    try:
        yield
    except (Exception, KeyboardInterrupt, Terminated) as error:
        stop = error if isinstance(error, KeyboardInterrupt | Terminated) else asked_to_stop()  # an import makes other errors of it
        if stop is None:
            raise
        raise type(stop)(told(stop) or words()) from None


def left_in(folder: Path | None, further: str = "continue with --resume") -> AbstractContextManager[None]:
    """Inside, Ctrl-C and SIGTERM name the folder that holds the finished work, if that folder exists, and say how to go on."""

    def words() -> str:
        return f"finished work is in '{folder}': {further}" if folder is not None and folder.is_dir() else ""

    return keeping(words)


def told(error: BaseException) -> str:
    """What is kept and how to go on, as far as it is known."""
    return (error.where if isinstance(error, Terminated) else str(error)).strip()


_stopped: list[BaseException] = []  # Ctrl-C and SIGTERM as they came: libraries swallow them, and imports make other errors of them


def asked_to_stop() -> BaseException | None:
    """Ctrl-C or SIGTERM, if one came."""
    return _stopped[0] if _stopped else None


def stop_if_asked() -> None:
    """Stop now if a library has swallowed the wish to."""
    if _stopped:
        raise _stopped[0]


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack like Ctrl-C, and remember both."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(error: BaseException) -> None:
        _stopped.append(error)
        raise error

    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: stop(Terminated())),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: stop(KeyboardInterrupt())),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _stopped.clear()
