"""What a measurement ran on: processor, memory, versions, and how much of the memory it took."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from reelquant._version import __version__


def machine() -> dict[str, Any]:
    """Names and sizes of the hardware."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else None
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": memory and round(memory, 1),
        "gpu": gpu,
        "os": platform.platform(terse=True),
    }


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )


def multiplies_bf16(device: str) -> bool:
    """Whether a type of device has instructions for bfloat16; processors without them run it in detours, several times as slow as float32.

    Stricter than :func:`reelquant.kernels.native_float`, which counts every processor on which oneDNN accepts bfloat16.
    """
    if device != "cpu":
        return True
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not known:  # torch before 2.13
        return torch.cpu._is_avx512_bf16_supported()
    return any(has is True for name, has in known.items() if "bf16" in name)


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"reelquant": __version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "scipy", "av", "opencv-python-headless", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_memory() -> float:
    """Most memory that this process has held, in GB of 10^9 bytes; on a GPU, that of the GPU."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)
