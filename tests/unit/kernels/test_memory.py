"""Pages of a checkpoint's mapping can be dropped and come back; other memory is never touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reelquant.kernels.cpu import int8, int16_madd
from reelquant.kernels.cpu.page_alloc import alloc_pages
from reelquant.nn import host_memory


def resident_file_pages() -> int:
    """Bytes of files that this process holds in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_mapped_weight_leaves_memory_and_comes_back_when_it_is_read(tmp_path: Path) -> None:
    stored = torch.randint(-128, 128, (4096, 2048), dtype=torch.int8)
    save_file({"weight": stored}, tmp_path / "one.safetensors")
    weight = load_file(tmp_path / "one.safetensors")["weight"]
    assert int(weight.long().sum()) == int(stored.long().sum())  # read: its pages are resident now
    before = resident_file_pages()
    host_memory.release_mmap_pages(weight)
    assert before - resident_file_pages() > 0.9 * weight.numel()
    assert torch.equal(weight, stored)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_arrays_in_pages_of_their_own_leave_memory_with_their_last_reader() -> None:
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    size, before = 32 << 20, resident()
    array = alloc_pages((size // 4, 2, 2), np.uint8)
    assert not array.any() and array.flags.c_contiguous and resident() - before < size // 8  # untouched pages take nothing
    array[:] = 7
    tensor = torch.from_numpy(array)[5:]
    del array
    assert resident() - before > size * 0.9 and bool((tensor == 7).all())
    del tensor
    assert resident() - before < size // 8


PREPARED = """
import sys
import torch
from torch import nn
from benchmarks.speed.memory import high_water, reset_high_water
from reelquant.kernels import backend
from reelquant.nn import LayerLayout, LayerTensors, TensorLayout, quantized_class

torch.set_num_threads(1)
bits, grain = sys.argv[1:]
def made(rows, width):
    module = nn.Linear(width, rows, device="meta")
    layout = LayerLayout(TensorLayout("int" + bits, grain), TensorLayout("int8", "token", dynamic=True), bias=True)
    layer = quantized_class(module).like(module, layout)
    codes = torch.zeros(rows, width * int(bits) // 8, dtype=torch.int8 if bits == "8" else torch.uint8)
    scales = torch.ones(layer.weight_scale.shape, dtype=torch.bfloat16)
    layer.fill(LayerTensors(codes, scales, torch.zeros(rows), {}))
    return layer
with torch.no_grad():
    made(64, 128)(torch.ones(3, 128))  # libraries and compiled loops
    layer = made(8192, 8192)
    if not reset_high_water():
        sys.exit(77)
    before, size = high_water(), layer.weight.numel()
    layer.prepare()
    print(layer.kernel.name.replace(' ', '-'), (high_water() - before) / size, sep=",")
    reset_high_water()
    print((high_water() - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux" or int16_madd.available() is not None, reason="reads /proc, runs AVX2")
@pytest.mark.skipif(int8.available() is None, reason="oneDNN repacks a whole weight at a time")
@pytest.mark.parametrize(("bits", "grain"), [("8", "channel"), ("4", "group-64")])
def test_preparing_a_layer_takes_one_more_copy_of_its_packed_weight_and_keeps_none(bits: str, grain: str) -> None:
    """The new layout stands beside the old one; a copy that is widened, or in another order, would be as much again or more."""
    done = subprocess.run([sys.executable, "-c", PREPARED, bits, grain], capture_output=True, text=True, timeout=300)
    if done.returncode == 77:
        pytest.skip("marks of memory cannot be reset here")
    assert done.returncode == 0, done.stderr
    (name, peak), (kept,) = (line.split(",") for line in done.stdout.split())
    assert name == "int16-pairs"
    assert float(peak) < 1.25 and float(kept) < 0.1


def test_memory_that_is_no_mapped_checkpoint_is_left_alone() -> None:
    plain = torch.arange(1 << 20)
    host_memory.release_mmap_pages(plain)
    host_memory.release_mmap_pages(plain[5:7])
    host_memory.release_mmap_pages(torch.empty(0))
    host_memory.release_mmap_pages(torch.empty(3, device="meta"))
    assert torch.equal(plain, torch.arange(1 << 20))
