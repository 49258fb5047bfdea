"""The folder of an evaluation: claimed once, resumed, and never read half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reelquant import CheckpointError
from reelquant.evidence.store import Store

ROW = {"name": "0000", "sources": ["psnr"], "figures": {"psnr": 30.0}, "curves": {"psnr": [30.0]}}


def test_a_folder_is_continued_only_by_the_same_settings(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    store.begin({"seed": 1}, resume=False, force=False)
    store.add("test", ROW)
    with pytest.raises(CheckpointError, match="--resume"):
        store.begin({"seed": 1}, resume=False, force=False)
    with pytest.raises(CheckpointError, match="seed was 1, is 2"):
        store.begin({"seed": 2}, resume=True, force=False)
    store.begin({"seed": 1}, resume=True, force=False)
    assert list(store.rows("test")) == ["0000"]
    store.begin({"seed": 2}, resume=False, force=True)
    assert store.rows("test") == {}


def test_more_clips_of_the_same_kind_continue(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.begin({"prompts": ["a", "b"], "seeds": [1, 2]}, resume=False, force=False)
    store.begin({"prompts": ["a", "b", "c"], "seeds": [1, 2, 3]}, resume=True, force=False)
    with pytest.raises(CheckpointError, match="prompts was"):
        store.begin({"prompts": ["a", "x", "c"], "seeds": [1, 2, 3]}, resume=True, force=False)


def test_a_folder_with_other_things_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(CheckpointError, match="is not empty"):
            Store(tmp_path).begin({}, resume=False, force=force)


def test_rows_of_several_looks_are_one_row(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add("test", ROW)
    store.add("test", {"name": "0000", "sources": ["ssim"], "figures": {"ssim": 0.9}, "curves": {}})
    row = store.rows("test")["0000"]
    assert row["sources"] == ["psnr", "ssim"]
    assert row["figures"] == {"psnr": 30.0, "ssim": 0.9}
    assert row["curves"] == {"psnr": [30.0]}


def test_a_line_cut_short_by_a_kill_is_measured_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add("test", ROW)
    file = tmp_path / "measured" / "test.jsonl"
    file.write_text(file.read_text() + '{"name": "0001", "sour')
    assert list(store.rows("test")) == ["0000"]
    store.add("test", ROW | {"name": "0001"})
    assert list(store.rows("test")) == ["0000", "0001"]


def test_tensors_come_back_and_broken_ones_are_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    value = torch.arange(6.0).reshape(2, 3)
    assert not store.has("i3d", "test", "0000")
    store.put("i3d", "test", "0000", value)
    assert torch.equal(store.get("i3d", "test", "0000"), value)
    store.tensor_file("i3d", "test", "0000").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="delete it and resume"):
        store.get("i3d", "test", "0000")
