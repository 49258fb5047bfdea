"""How loops are compiled."""

from __future__ import annotations

from typing import Any

EXACT: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": {"contract", "nsz"}}
"""Sums are added in the order they are written in; the interpreter is free meanwhile, and machine code stays on disk."""

SUMS: dict[str, Any] = EXACT | {"fastmath": {"contract", "nsz", "reassoc"}}
"""Sums are added in any order, so they vectorise; NaN and infinities show in them."""

FAST: dict[str, Any] = EXACT | {"fastmath": {"contract", "nsz", "nnan", "ninf", "arcp", "reassoc"}}
"""Numbers may be assumed to be finite."""
