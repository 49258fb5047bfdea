"""Triton kernels for NVIDIA GPUs (compute capability 8.0 and later), and the same kernels in Triton's interpreter for tests on a CPU.
Kernels of other devices do not belong here.

Importing this package needs neither triton nor a GPU: a function is imported when it is first asked for. :func:`available` says
whether one can run here.

State: checked in Triton's interpreter and compiled for compute capability 8.0 and 9.0; no kernel has run on a GPU yet. The interpreter
rounds wrongly by itself (``tests/unit/kernels/cuda/rounding.py`` says how and corrects it), so it is for tests only. The first call with
a new shape compiles and tunes; do it before a CUDA graph is captured.

| file | what |
|---|---|
| ``quantize.py`` | rewrite and rounding of inputs to codes in one pass over memory |
| ``gemm.py`` | codes times codes: 8-bit inputs, 8-bit weights, everything after the product in the same kernel |
| ``gemm_grouped.py`` | 4-bit weights in groups, and 8-bit weights with float inputs |
| ``conv.py`` | convolutions of codes in two and three dimensions, without unfolding |
| ``attention.py`` | attention with 8-bit query-key products |
| ``layers.py`` | which of them computes a quantized layer |
| ``epilogue.py`` | what follows a product: scales, corrections, bias, activation |
| ``launch.py`` | what all of them share on the host |
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

MODULES: dict[str, str] = {
    "quantize_static": "quantize",
    "quantize_per_token": "quantize",
    "quantize_per_sample": "quantize",
    "linear_8bit": "gemm",
    "weight_sums": "gemm",
    "repack_4bit": "gemm_grouped",
    "linear_w4a8": "gemm_grouped",
    "linear_w4a16": "gemm_grouped",
    "linear_w8a16": "gemm_grouped",
    "repack_convolution": "conv",
    "padding_codes": "conv",
    "convolution_8bit": "conv",
    "attention_8bit": "attention",
}
FLOAT8 = (8, 9)  # compute capability: Ada; older chips have no e4m3
OLDEST = (8, 0)  # compute capability: Ampere; 8-bit integer tensor cores of older chips take other instructions


@functools.cache
def available() -> str | None:
    """None if these kernels can run in this process, else the reason why not, as one sentence."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton`"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "there is no CUDA device"
    if (found := torch.cuda.get_device_capability()) < OLDEST:
        return f"the GPU has compute capability {found[0]}.{found[1]}; these kernels need {OLDEST[0]}.{OLDEST[1]}"
    return None


def float8() -> str | None:
    """None if this machine multiplies e4m3, with Triton or without, else the reason why not. Without a GPU torch emulates it."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    found = torch.cuda.get_device_capability()
    return None if found >= FLOAT8 else f"e4m3 needs compute capability {FLOAT8[0]}.{FLOAT8[1]}, the GPU has {found[0]}.{found[1]}"


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)


__all__ = ["FLOAT8", "MODULES", "OLDEST", "available", "float8"]
