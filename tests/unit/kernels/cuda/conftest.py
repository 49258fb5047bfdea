"""On a machine without CUDA the kernels run in Triton's interpreter, which ``tests/conftest.py`` asks for before triton is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

INSTALLED = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if INSTALLED else ["test_quantize.py", "test_gemm*.py", "test_conv.py", "test_attention.py"]

if INSTALLED and not torch.cuda.is_available():
    from tests.unit.kernels.cuda import rounding

    rounding.install()


@pytest.fixture
def device() -> str:
    """Where the kernels run: a CUDA device if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _quiet_numpy() -> Iterator[None]:
    """The interpreter computes with numpy, which warns where hardware overflows to infinity, as the maths wants it to."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write shows: NaN in floats, 85 in codes."""
    if not INSTALLED:
        return
    from reelquant.kernels.cuda import launch

    def new(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        memory = torch.empty(shape, dtype=dtype, device=device)
        memory.view(torch.uint8).fill_(0x7F) if dtype == launch.FP8 else memory.fill_(torch.nan if dtype.is_floating_point else 85)
        return memory

    monkeypatch.setattr(launch, "new", new)
