"""Pages of a checkpoint's mapping can be dropped and come back; other memory is never touched."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reelquant.nn import pages


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
    pages.drop_mapped(weight)
    assert before - resident_file_pages() > 0.9 * weight.numel()
    assert torch.equal(weight, stored)


def test_memory_that_is_no_mapped_checkpoint_is_left_alone() -> None:
    plain = torch.arange(1 << 20)
    pages.drop_mapped(plain)
    pages.drop_mapped(plain[5:7])
    pages.drop_mapped(torch.empty(0))
    pages.drop_mapped(torch.empty(3, device="meta"))
    assert torch.equal(plain, torch.arange(1 << 20))
