"""Clips that other programs made: read as they are meant, or a sentence says what was not read."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import reelquant
from reelquant import CheckpointError, _remarks
from reelquant._remarks import remarks
from reelquant.evidence.clips import find_clips
from reelquant.evidence.media import write_video
from reelquant.evidence.reading import read_pictures, read_video

GREY = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)


def smooth(frames: int = 9) -> torch.Tensor:
    noise = torch.rand(frames, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, size=(64, 64), mode="bilinear")


def picture(file: Path, value: int = 100, size: int = 8) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, 0, 0)).save(file, quality=95)
    return file


# ------------------------------------------------------------------------------------------------------------------------- videos


def damage(file: Path, seed: int) -> None:
    content, dice = bytearray(file.read_bytes()), random.Random(seed)
    start = dice.randrange(len(content) // 4, len(content) // 2)
    content[start : start + 2000] = dice.randbytes(2000)
    file.write_bytes(content)


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_damaged_video_is_not_measured_as_if_it_were_whole(tmp_path: Path, seed: int, lossless: bool) -> None:
    """Decoders fill what they cannot read with what was there before."""
    write_video(smooth(), tmp_path / "a.mp4", lossless=lossless)
    damage(tmp_path / "a.mp4", seed)
    with pytest.raises(CheckpointError, match=r"is damaged|as a video"):
        read_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("lossless", [False, True])
def test_a_video_that_was_cut_short_is_named(tmp_path: Path, lossless: bool) -> None:
    """With its list of frames in front, as on pages, a cut file opens."""
    import av

    write_video(smooth(), tmp_path / "a.mp4", lossless=lossless)
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert len(read_video(tmp_path / "b.mp4")) == 9
    whole = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(CheckpointError, match=r"is damaged|as a video"):
        read_video(tmp_path / "b.mp4")


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_clips_that_play_at_other_speeds_are_told(tmp_path: Path, ending: str) -> None:
    for side, rate in (("a", 8), ("b", 25), ("c", 8)):
        for name in ("one", "two"):
            write_video(smooth(), tmp_path / side / f"{name}.{ending}", rate)
    found = reelquant.compare(tmp_path / "b", tmp_path / "a", metrics=["psnr"])
    (sentence,) = [one for one in found.data["warnings"] if "another speed" in one]
    assert sentence.startswith("2 clips play at another speed than the reference's ('one': 25 frames per second, not 8")
    assert "another speed" not in str(reelquant.compare(tmp_path / "c", tmp_path / "a", metrics=["psnr"]).data["warnings"])


def test_odd_sides_that_are_padded_are_told(tmp_path: Path) -> None:
    for name, size in (("odd", 17), ("even", 16)):
        with remarks() as told:
            write_video(smooth()[..., :size, :size], tmp_path / f"{name}.mp4")
        assert bool(told) == (size == 17)
    with remarks() as told:
        write_video(smooth()[..., :17, :17], tmp_path / "odd.mp4", lossless=True)
    assert not told


# ----------------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bit_grey_is_scaled(tmp_path: Path, ending: str) -> None:
    Image.fromarray(GREY).save(tmp_path / f"a.{ending}")
    found = read_pictures([tmp_path / f"a.{ending}"])
    assert found.shape == (1, 3, 8, 8)
    torch.testing.assert_close(found[0, 1], torch.from_numpy(GREY.astype(np.float32)) / 65535)


def film(file: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (0, 100, 200)]
    frames[0].save(file, save_all=True, append_images=frames[1:])


def floats(file: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.float32)).save(file)


@pytest.mark.parametrize(("name", "make", "words"), [("a.png", film, "a film of 3 pictures"), ("a.tif", floats, "it holds floats")])
def test_pictures_that_are_something_else_are_refused(tmp_path: Path, name: str, make: Callable[[Path], None], words: str) -> None:
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=words):
        read_pictures([tmp_path / name])


def test_a_turned_photo_is_upright(tmp_path: Path) -> None:
    turned = Image.new("RGB", (8, 4), (200, 0, 0))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.jpg", exif=exif)
    assert read_pictures([tmp_path / "a.jpg"]).shape == (1, 3, 8, 4)


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "webp", "bmp", "JPG"])
def test_frames_in_other_formats_are_a_clip(tmp_path: Path, ending: str) -> None:
    for number in range(3):
        picture(tmp_path / "take" / f"{number:03d}.{ending}", 100 * number)
    found = find_clips(tmp_path)["take"].read()
    assert found[:, 0].mean((1, 2)).tolist() == pytest.approx([0, 100 / 255, 200 / 255], abs=0.02)


# ------------------------------------------------------------------------------------------------------------------------ folders


def photos(folder: Path) -> None:
    for name in ("cat", "dog", "horse"):
        picture(folder / "photos" / f"{name}.png")


def two_takes(folder: Path) -> None:
    for name in ("a-000", "a-001", "b-000", "b-001"):
        picture(folder / "takes" / f"{name}.png")


def nested(folder: Path) -> None:
    write_video(smooth(), folder / "day" / "b.mp4")


def deeper(folder: Path) -> None:
    picture(folder / "day" / "000.png")
    write_video(smooth(), folder / "day" / "more" / "c.mp4")


def unknown(folder: Path) -> None:
    (folder / "clip.npy").write_bytes(b"x")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (photos, r"photos/ \(3 pictures that are not the numbered frames of one clip\)"),
        (two_takes, r"takes/ \(4 pictures that are not"),
        (nested, r"day/ \(in it: b\.mp4\)"),
        (deeper, r"day/ \(in it: more\)"),
        (unknown, r"clip\.npy"),
    ],
)
def test_what_is_not_read_is_said(tmp_path: Path, make: Callable[[Path], None], words: str, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path)
    if make is not deeper:
        with pytest.raises(CheckpointError, match=words):
            find_clips(tmp_path)
    write_video(smooth(), tmp_path / "a.mp4")
    (tmp_path / "prompts.txt").write_text("a ball")
    _remarks._logged.clear()
    caplog.clear()
    assert "a" in find_clips(tmp_path)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "prompts.txt" not in record.getMessage()
    assert re.search(words, record.getMessage())


def test_a_folder_of_numbered_pictures_is_one_clip_and_says_so(tmp_path: Path) -> None:
    """They may be pictures of their own."""
    for number in range(3):
        picture(tmp_path / f"{number:05d}.png")
    with remarks() as told:
        assert len(find_clips(tmp_path)["frames"].files) == 3
    assert "the 3 numbered pictures" in told[0] and "one clip" in told[0]
    for name in ("cat", "dog"):
        next(tmp_path.glob("0000*.png")).rename(tmp_path / f"{name}.png")
    with remarks() as told:
        assert list(find_clips(tmp_path)) == ["cat", "dog", "frames"]
    assert not told


def test_the_report_of_two_folders_says_what_was_not_read(tmp_path: Path) -> None:
    for side in ("a", "b"):
        write_video(smooth(), tmp_path / side / "one.mp4")
    nested(tmp_path / "b")
    found = reelquant.compare(tmp_path / "b", tmp_path / "a", metrics=["psnr"])
    assert "day/ (in it: b.mp4)" in str(found.data["warnings"])
