"""The folder of an evaluation: claimed once, resumed, and never read half-written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import reelquant
from reelquant import CheckpointError
from reelquant.evidence.sampling import ClipSource, SamplingJob, Variant
from reelquant.evidence.store import Store
from tests.tiny.stock import CALL, PROMPTS, wan_pipeline

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


def test_what_is_not_what_was_written_is_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_clip("test", "0000", torch.rand(2, 3, 16, 16), 8)
    store.put("latents", "test", "0000", torch.rand(3))
    assert store.has_clip("test", "0000") and store.has("latents", "test", "0000")
    for file in (store.clip("test", "0000"), store.tensor_file("latents", "test", "0000")):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert not store.has_clip("test", "0000")
        file.unlink()
        assert not store.has_clip("test", "0000")
        file.write_bytes(content)
        assert store.has_clip("test", "0000")
    (tmp_path / "clips" / "test" / "SHA256SUMS").unlink()  # an evaluation of an older version
    assert store.has_clip("test", "0000")


def test_a_damaged_row_is_measured_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add("test", ROW)
    file = tmp_path / "measured" / "test.jsonl"
    line = file.read_text()
    file.write_text(line.replace("30.0", "31.0", 1))
    assert store.rows("test") == {}
    for broken in ("[]", "3", '{"name": 1}', "[" * 5000):
        file.write_text(broken + "\n" + line)
        assert list(store.rows("test")) == ["0000"]


def test_sums_are_borrowed_with_the_clips(tmp_path: Path) -> None:
    first, second = Store(tmp_path / "first"), Store(tmp_path / "second")
    first.begin({"seed": 1}, resume=False, force=False)
    first.put_clip("reference", "0000", torch.rand(2, 3, 16, 16), 8)
    second.begin({"seed": 1}, resume=False, force=False)
    second.put_clip("reference", "0001", torch.rand(2, 3, 16, 16), 8)
    second.borrow(tmp_path / "first", {"seed": 1})
    assert second.has_clip("reference", "0000") and second.has_clip("reference", "0001")
    assert not first.has_clip("reference", "0001")
    assert len((tmp_path / "first" / "clips" / "reference" / "SHA256SUMS").read_text().splitlines()) == 1


@pytest.mark.parametrize("content", ["{", "[]", "3", "null", "[" * 5000])
def test_a_broken_run_json_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match="--force"):
        Store(tmp_path).begin({"seed": 1}, resume=True, force=False)
    with pytest.raises(CheckpointError):
        Store(tmp_path / "other").borrow(tmp_path, {"seed": 1})


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    store.begin({"kind": "x"}, resume=True, force=False)
    store.put_clip("test", "0000", torch.zeros(2, 3, 8, 8), 8)
    left = store.clip("test", "0001").with_name("..writing-0001.05c86468.mp4")
    left.write_bytes(b"half")
    store.begin({"kind": "x"}, resume=True, force=False)
    assert not left.exists() and store.has_clip("test", "0000")


def test_a_call_whose_clips_were_not_all_written_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, store = wan_pipeline(), Store(tmp_path / "out")
    reelquant.quantize(pipe, "w8a16")
    job = SamplingJob(store, PROMPTS, [1, 2], CALL)
    stops = iter([None, KeyboardInterrupt])
    put = Store.put_clip

    def stopped(self: Store, *args: Any) -> None:
        if stop := next(stops, None):
            raise stop
        put(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_clip", stopped)
        with pytest.raises(KeyboardInterrupt):
            job.make("test", Variant(ClipSource(pipe), counted=True))
    assert store.has_clip("test", "0000") and store.counts("test") == {}
    job.make("test", Variant(ClipSource(pipe), counted=True))
    assert len((store.root / "saturation" / "test.jsonl").read_text().splitlines()) == 1
