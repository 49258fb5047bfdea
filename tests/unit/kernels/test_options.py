"""How loops are compiled."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from numba.core import caching

from reelquant.kernels.cpu.options import EXACT, compiled


def test_a_full_disk_does_not_stop_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def save(*_: Any) -> None:
        tried.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", save)

    @compiled(**EXACT)
    def twice(x: int) -> int:
        return 2 * x

    assert twice(4) == 8 and tried
