"""Folders of clips: what is found, how it is paired, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reelquant import CheckpointError
from reelquant.evidence.clips import find_clips, unpaired
from reelquant.evidence.media import write_video


def clip(frames: int = 3, size: int = 16, seed: int = 0) -> torch.Tensor:
    return (torch.rand(frames, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 255).round() / 255


def test_videos_numbered_pictures_and_folders_of_pictures_are_clips(tmp_path: Path) -> None:
    write_video(clip(), tmp_path / "a.mp4", lossless=True)
    write_video(clip(), tmp_path / "b.gif")
    write_video(clip(), tmp_path / "c.png")
    (tmp_path / "d").mkdir()
    write_video(clip(), tmp_path / "d" / "frame.png")
    (tmp_path / "notes.txt").write_text("not a clip")
    found = find_clips(tmp_path)
    assert list(found) == ["a", "b", "c", "d"]
    assert [len(found[name].files) for name in "abcd"] == [1, 1, 3, 3]
    for name in "acd":
        assert torch.equal(found[name].read(), clip())


def test_pictures_are_frames_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (2, 10, 1):
        write_video(torch.full((1, 3, 8, 8), number / 10), tmp_path / "x.png")
        (tmp_path / "x-000.png").rename(tmp_path / f"take{number}.png")
    assert find_clips(tmp_path)["take"].read()[:, 0, 0, 0].tolist() == pytest.approx([26 / 255, 51 / 255, 1.0])


def test_lossless_files_keep_every_pixel_and_odd_sizes(tmp_path: Path) -> None:
    odd = clip(2, 17)
    write_video(odd, tmp_path / "odd.mp4", lossless=True)
    assert torch.equal(find_clips(tmp_path)["odd"].read(), odd)


def test_a_folder_of_numbers_alone_is_one_clip(tmp_path: Path) -> None:
    for number in range(2):
        write_video(clip(1), tmp_path / "x.png")
        (tmp_path / "x-000.png").rename(tmp_path / f"{number:03d}.png")
    assert list(find_clips(tmp_path)) == ["frames"]


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder: folder / "nowhere", "no folder of clips"),
        (lambda folder: folder, "no clip in"),
        (lambda folder: [write_video(clip(), folder / f"a.{end}") for end in ("mp4", "gif")] and folder, "two clips are called 'a'"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(tmp_path: Path, prepare, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        find_clips(prepare(tmp_path))


def test_broken_files_are_named(tmp_path: Path) -> None:
    write_video(clip(), tmp_path / "cut.mp4")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:200])
    (tmp_path / "no.png").write_bytes(b"nothing")
    found = find_clips(tmp_path)
    with pytest.raises(CheckpointError, match=r"cut\.mp4"):
        found["cut"].read()
    with pytest.raises(CheckpointError, match=r"no\.png"):
        found["no"].read()


def test_frames_of_different_sizes_are_refused(tmp_path: Path) -> None:
    for number, size in enumerate((8, 9)):
        write_video(clip(1, size), tmp_path / f"f{number}" / "x.png")
        (tmp_path / f"f{number}" / "x-000.png").rename(tmp_path / f"x{number}.png")
    with pytest.raises(CheckpointError, match="8x8 and 9x9"):
        find_clips(tmp_path)["x"].read()


def test_unpaired_names() -> None:
    assert unpaired({"a": None, "b": None}, {"b": None, "c": None}) == ["a", "c"]  # type: ignore[dict-item]
