"""Peak memory of one piece of work: its high-water mark of resident pages, in a process of its own.

In the process that measures time everything is mixed: freed heaps that were not given back, the libraries of all peers. So a fresh
interpreter builds one variant, the mark is reset (``/proc/self/clear_refs``), the work runs, and the mark is read.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MARK = "reelquant-result:"  # before the JSON that a child prints, because libraries print too
MB = 1e6


def high_water() -> float:
    """The most memory this process ever held, or held since :func:`reset_high_water`; in bytes."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return float(found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def reset_high_water() -> bool:
    """Set the mark to what is held now, after giving freed heap back; False where the system has no such thing."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peaks(build: Callable[[], Callable[[], object]], calls: int = 2) -> dict[str, float]:
    """Megabytes of the bare process, while building and while running: ``build`` makes the function that is then called."""
    bare = high_water() if reset_high_water() else float("nan")
    work = build()
    built = high_water()
    reset_high_water()
    for _ in range(calls):
        work()
    return {"rss_bare_mb": round(bare / MB), "rss_build_mb": round(built / MB), "rss_mb": round(high_water() / MB)}


def answer(result: Any) -> None:
    """In the child: hand the result over."""
    print(MARK + json.dumps(result), flush=True)


def in_fresh_process(module: str, arguments: Sequence[str], timeout: float = 1800) -> Any:
    """Run ``python -m module arguments`` with this interpreter and return what it gave to :func:`answer`.

    Raises:
        RuntimeError: with the last line of its errors if it gave nothing.
    """
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=timeout)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
