"""The package around the kernels: laziness, ``torch.compile``, and that everything compiles for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from reelquant.kernels import cuda
from tests.unit.kernels.cuda.conftest import INSTALLED

needs_triton = pytest.mark.skipif(not INSTALLED, reason="needs triton")


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, reelquant.kernels.cuda; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "0"}, check=False).returncode == 0


def test_a_reason_is_given_where_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = cuda.available.__wrapped__  # without what this process has found before
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert asked() == "there is no CUDA device"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in asked()


@needs_triton
def test_every_listed_name_exists() -> None:
    assert cuda.available() is None
    assert all(inspect.getdoc(getattr(cuda, name)) for name in cuda.MODULES)
    with pytest.raises(AttributeError, match="no_such"):
        _ = cuda.no_such


def calls() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """One call of every operator."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, one = torch.randn(3, 4, 64, device=device).bfloat16(), torch.ones(1, 1, device=device)
    codes, weight = torch.ones(3, 4, 64, dtype=torch.int8, device=device), torch.ones(8, 64, dtype=torch.int8, device=device)
    group_scale, scale = torch.ones(1, 8, device=device), torch.ones(8, device=device)
    image, heads = torch.ones(2, 8, 5, 6, dtype=torch.int8, device=device), x[None].expand(2, 3, 4, 64)
    kernel = torch.ones(3, 1, 3, 3, 8, dtype=torch.int8, device=device)
    return {
        "quantize_static": (cuda.quantize_static, (x, one), {"pre_scale": x[0, 0]}),
        "quantize_per_token": (cuda.quantize_per_token, (x,), {"pre_shift": x[0, 0]}),
        "quantize_per_sample": (cuda.quantize_per_sample, (x,), {"pre_shift": x[0, 0]}),
        "linear_8bit": (cuda.linear_8bit, (codes, weight, one, scale), {"activation": "silu", "out_dtype": torch.float16}),
        "linear_w4a8": (cuda.linear_w4a8, (codes, weight[:, :32].contiguous(), group_scale, one), {}),
        "linear_w4a16": (cuda.linear_w4a16, (x, weight[:, :32].contiguous(), group_scale), {"bias": scale}),
        "linear_w8a16": (cuda.linear_w8a16, (x, weight, scale), {}),
        "convolution_8bit": (cuda.convolution_8bit, (image, kernel, one, one[0], [2, 1], [1, 1], [1, 1]), {}),
        "attention_8bit": (cuda.attention_8bit, (heads, heads, heads), {"float8_values": True}),
    }


@needs_triton
@pytest.mark.parametrize("name", sorted(cuda.MODULES.keys() - {"weight_sums", "repack_4bit", "repack_convolution", "padding_codes"}))
def test_a_graph_without_breaks_sees_the_right_shapes(name: str) -> None:
    """``eager`` runs the graph that dynamo captured: the fake's shape, strides and dtype are checked against the kernel's."""
    function, arguments, options = calls()[name]
    expected = function(*arguments, **options)
    torch._dynamo.reset()  # one lambda for all operators: dynamo gives up after eight versions of it
    compiled = torch.compile(lambda *a: function(*a, **options), backend="aot_eager", fullgraph=True)(*arguments)
    for found, wanted in zip(*((r if isinstance(r, tuple) else (r,)) for r in (compiled, expected)), strict=True):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape and found.stride() == wanted.stride()
        assert torch.equal(found.float(), wanted.float())


@needs_triton
@pytest.mark.full
@pytest.mark.parametrize("capability", ["90"])  # others by hand: each takes some ten seconds
def test_kernels_compile_for_absent_gpus(capability: str) -> None:
    """Every kernel, the first tile of each; ``ahead`` without ``--first`` goes through all tiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-m", "tests.unit.kernels.cuda.ahead", capability, "--first"], capture_output=True, text=True, env=environment
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    kernels = {line.split()[0] for line in lines}
    assert {"_quantize", "_product", "_mixed", "_convolve", "_quantize_keys", "_attend"} <= kernels
    integer = [line for line in lines if line.startswith(("_product", "_convolve", "_attend"))]
    assert all(("s32.s8.s8" in line) or ("e4m3" in line) for line in integer), found.stdout
