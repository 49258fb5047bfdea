"""Where the library keeps what it can make or fetch again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache: $REELQUANT_CACHE, or else ``reelquant`` of $XDG_CACHE_HOME or ~/.cache. It need not exist."""
    if own := os.environ.get("REELQUANT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "reelquant"
