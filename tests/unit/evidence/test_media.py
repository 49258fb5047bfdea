from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from reelquant import CheckpointError
from reelquant.evidence import contact_sheet, read_video, side_by_side, write_video


def clip(frames: int = 5, height: int = 32, width: int = 48) -> Tensor:
    """A bright square that moves right over a smooth ramp."""
    picture = torch.linspace(0.2, 0.6, width).expand(frames, 3, height, width).clone()
    for i in range(frames):
        picture[i, 0, 8:20, 4 + 4 * i : 16 + 4 * i] = 0.9
    return picture


def test_mp4_comes_back_with_size_frames_and_content(tmp_path: Path) -> None:
    written = clip()
    read = read_video(write_video(written, tmp_path / "deep" / "a.mp4")[0])
    assert read.shape == written.shape
    assert (read - written).abs().mean() < 0.03  # H.264 halves the colour resolution: edges of the square blur by a pixel


def test_odd_sides_are_padded_to_even_ones(tmp_path: Path) -> None:
    assert read_video(write_video(clip(height=31, width=47), tmp_path / "a.mp4")[0]).shape == (5, 3, 32, 48)


def test_gif_keeps_flat_colours_exactly_and_plays_forever(tmp_path: Path) -> None:
    written = (torch.arange(4).view(4, 1, 1, 1) * 51 / 255).expand(4, 3, 8, 8)
    (file,) = write_video(written, tmp_path / "a.gif", fps=10)
    with Image.open(file) as picture:
        assert (picture.n_frames, picture.info["loop"], picture.info["duration"]) == (4, 0, 100)
    assert torch.equal((read_video(file) * 255).round(), (written * 255).round())


def test_png_is_one_exact_picture_per_frame(tmp_path: Path) -> None:
    files = write_video(clip(frames=3), tmp_path / "a.png")
    assert [file.name for file in files] == ["a-000.png", "a-001.png", "a-002.png"]
    with Image.open(files[2]) as picture:
        assert picture.size == (48, 32)
        assert picture.getpixel((20, 10)) == (round(0.9 * 255), *[round(float(clip()[2, 1, 10, 20]) * 255)] * 2)


def test_values_outside_the_range_are_clamped(tmp_path: Path) -> None:
    (file,) = write_video(torch.full((1, 3, 2, 2), 1.7), tmp_path / "a.png")
    with Image.open(file) as picture:
        assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_unknown_ending_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'a.avi'; end it in .mp4, .gif, .png"):
        write_video(clip(), tmp_path / "a.avi")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_video(clip(), tmp_path / "taken" / "a.mp4")
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


def test_reading_what_is_no_video_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("hello")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_video(tmp_path / "a.mp4")
    with pytest.raises(CheckpointError, match=r"did you mean 'a.mp4'"):
        read_video(tmp_path / "b.mp4")


def test_contact_sheet_shows_first_and_last_frame_of_every_variant(tmp_path: Path) -> None:
    black, white = torch.zeros(2, 5, 3, 64, 64), torch.ones(2, 5, 3, 64, 64)
    white[:, -1, 1:] = 0  # red at the end
    path = contact_sheet([black, white], tmp_path / "sheet.png", ["float", "w8a8\n3.9x"], ["one clip", "another"], frames=3, title="t")
    with Image.open(path) as page:
        picture = torch.frombuffer(bytearray(page.convert("RGB").tobytes()), dtype=torch.uint8).reshape(page.height, page.width, 3)
    red = (picture == torch.tensor([255, 0, 0], dtype=torch.uint8)).all(-1)
    assert int(red.sum()) == 2 * 128 * 128  # 64 pixels are enlarged twice; one frame of each of two clips


def test_side_by_side_is_even_and_repeats(tmp_path: Path) -> None:
    clips = [torch.rand(2, 3, 3, 15, 15) for _ in range(3)]
    whole = side_by_side(clips, ["a", "b\nlonger", "c"], factor=3, loops=2)
    assert whole.shape[0] == 6
    assert all(side % 2 == 0 for side in whole.shape[-2:])
    assert torch.equal(whole[:3], whole[3:])
    assert torch.equal(whole[0, :, 40 + 1, 1], clips[0][0, 0, :, 0, 0])
