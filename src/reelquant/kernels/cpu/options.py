"""How loops are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba

EXACT: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": {"contract", "nsz"}}
"""Sums are added in the order they are written in; the interpreter is free meanwhile, and machine code stays on disk."""

PART: dict[str, Any] = EXACT | {"cache": False}
"""Of overloads, whose machine code is kept as a part of the loops that call them."""

SUMS: dict[str, Any] = EXACT | {"fastmath": {"contract", "nsz", "reassoc"}}
"""Sums are added in any order, so they vectorise; NaN and infinities show in them."""

FAST: dict[str, Any] = EXACT | {"fastmath": {"contract", "nsz", "nnan", "ninf", "arcp", "reassoc"}}
"""Numbers may be assumed to be finite."""


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` whose machine code is kept on disk where that is possible: a full disk or a read-only folder stops no work."""

    def decorate(loop: Callable[..., Any]) -> Any:
        dispatcher: Any = numba.njit(**options)(loop)
        if hasattr(dispatcher, "_cache"):  # not with NUMBA_DISABLE_JIT
            dispatcher._cache._guard_against_spurious_io_errors = _unless_it_fails  # numba reads and writes its files inside of it
        return dispatcher

    return decorate


@contextmanager
def _unless_it_fails() -> Iterator[None]:
    try:
        yield
    except OSError:
        return
