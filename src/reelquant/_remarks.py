"""Remarks on wishes that are not followed to the letter: logged once in a process, and kept for the report of the work."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

logger = logging.getLogger("reelquant")
_logged: set[str] = set()
_kept: ContextVar[tuple[list[str], ...]] = ContextVar("reelquant_remarks", default=())


def remark(sentence: str) -> None:
    """Tell the listeners something, and log it as a warning unless it was logged before."""
    for kept in _kept.get():
        if sentence not in kept:
            kept.append(sentence)
    if sentence not in _logged:
        _logged.add(sentence)
        logger.warning("%s", sentence)


@contextmanager
def remarks() -> Iterator[list[str]]:
    """A list that fills with what is remarked inside, each sentence once."""
    kept: list[str] = []
    token = _kept.set((*_kept.get(), kept))
    try:
        yield kept
    finally:
        _kept.reset(token)
