"""Files of conditions: what they hold, what each pipeline calls it, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from reelquant import CalibrationError, UnsupportedError, read_conditions
from reelquant.evidence.media import write_video
from reelquant.models.condition import Condition, fitted
from reelquant.models.conditions import at_once
from reelquant.models.defaults import FOLDER, own_clips, own_pictures
from reelquant.models.described import described
from reelquant.models.media import opened, stored


def picture(level: int = 90, mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new(mode, size, (level, 10, 200) if mode == "RGB" else level)


def clip(frames: int = 3) -> torch.Tensor:
    return torch.linspace(0, 1, frames)[:, None, None, None].expand(frames, 3, 16, 16)


class ImageToVideo:
    def __call__(
        self, image: Any, prompt: Any = None, negative_prompt: Any = None, height: int = 8, last_image: Any = None, generator: Any = None
    ): ...


class VideoToVideo:
    def __call__(self, prompt: Any = None, video: Any = None, mask: Any = None, reference_images: Any = None, strength: float = 0.8): ...


class Controlled:
    def __call__(self, prompt: Any = None, image: Any = None, controlnet_conditioning_scale: float = 1.0): ...


class ControlledClip:
    def __call__(self, prompt: Any = None, conditioning_frames: Any = None, controlnet_conditioning_scale: float = 1.0): ...


class Classes:
    def __call__(self, class_labels: Any, guidance_scale: float = 4.0, generator: Any = None): ...


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture().save(tmp_path / "a.png")
    picture(20).save(tmp_path / "b.png")
    write_video(clip(), tmp_path / "c.mp4", lossless=True)
    (tmp_path / "frames").mkdir()
    for i in range(2):
        picture(i).save(tmp_path / "frames" / f"{i}.png")
    save_file({"10": torch.ones(2), "9": torch.zeros(2)}, tmp_path / "two.safetensors")
    save_file({"x": torch.arange(3.0)}, tmp_path / "one.safetensors")
    return tmp_path


def lines(folder: Path, *entries: Any, name: str = "p.jsonl") -> list[Condition]:
    (folder / name).write_text("\n".join(json.dumps(entry) for entry in entries))
    return read_conditions(folder / name)


# ------------------------------------------------------------------------------------------------------------------------- reading


def test_values_that_are_paths_are_opened_beside_the_file(folder: Path) -> None:
    (one,) = lines(
        folder,
        {"prompt": "a dog", "image": "a.png", "video": "c.mp4", "mask": "frames", "x": "two.safetensors", "negative_prompt": "b.png"},
    )
    found = {name: opened(value) for name, value in one.inputs.items()}
    assert one.text == "a dog" and found["negative_prompt"] == "b.png"
    assert found["image"].tobytes() == picture().tobytes()
    assert [frame.size for frame in found["video"]] == [(16, 16)] * 3 and found["video"][2].getpixel((0, 0)) == (255, 255, 255)
    assert [frame.getpixel((0, 0))[0] for frame in found["mask"]] == [0, 1]
    assert [tensor.tolist() for tensor in found["x"]] == [[0, 0], [1, 1]]  # 9 before 10


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", "caption,image,class_labels,Category\na dog,a.png,3,x\n"),
        ("p.tsv", "prompt\timage\tclass_labels\tNote\na dog\ta.png\t3\ty\n"),
        ("p.yaml", "- {prompt: a dog, image: a.png, class_labels: 3, _note: y}\n"),
        ("p.json", '[{"text": "a dog", "image": "a.png", "class_labels": 3, "id": 9}]'),
    ],
)
def test_columns_and_lists_hold_the_same(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    (one,) = read_conditions(folder / name)
    assert one.text == "a dog" and described(dict(one.inputs)) == {"image": described(picture()), "class_labels": 3}


def test_a_folder_is_a_condition_for_every_picture(tmp_path: Path) -> None:
    picture().save(tmp_path / "b.png")
    picture().save(tmp_path / "a.jpg")
    write_video(clip(), tmp_path / "c.gif")
    (tmp_path / "b.txt").write_text("a dog\n runs\n")
    (tmp_path / ".hidden").write_text("x")
    found = read_conditions(tmp_path)
    assert [(one.name, one.text, list(one.inputs)) for one in found] == [
        ("a", "", ["image"]),
        ("b", "a dog runs", ["image"]),
        ("c", "", ["video"]),
    ]


def test_one_picture_is_one_condition(folder: Path) -> None:
    (one,) = read_conditions(folder / "a.png")
    assert described(one) == {"prompt": "", "image": described(picture())}


def broken_video(path: Path) -> None:
    write_video(clip(24), path, lossless=True)
    data = path.read_bytes()
    half = data.index(b"mdat") + 60
    path.write_bytes(data[:half] + bytes(len(data[half:])))


def deep(path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(path)


def see_through(path: Path) -> None:
    Image.new("RGBA", (4, 4), (9, 9, 9, 100)).save(path)


def animated(path: Path) -> None:
    write_video(clip(), path)


REFUSED: dict[str, tuple[Any, str, str]] = {
    "16 bits": (deep, "x.png", "stored as .*I;16"),
    "transparency": (see_through, "x.png", "parts of it are transparent"),
    "four colours": (lambda path: Image.new("CMYK", (4, 4)).save(path), "x.jpg", "stored as CMYK"),
    "no picture": (lambda path: path.write_bytes(b"hello"), "x.png", "cannot use .* as a picture"),
    "cut picture": (lambda path: (picture(size=(60, 60)).save(path), path.write_bytes(path.read_bytes()[:-40])), "x.png", "as a picture"),
    "broken clip": (broken_video, "x.mp4", "as a clip|is cut or broken"),
    "no clip": (lambda path: path.write_bytes(b"hello"), "x.mp4", "as a clip"),
    "missing": (lambda path: None, "x.png", "no file at"),
    "empty folder": (lambda path: path.mkdir(), "x", "holds no frame"),
    "nested": (lambda path: (path / "deeper").mkdir(parents=True), "x", "'deeper' is not a single picture"),
    "no tensors": (lambda path: path.write_bytes(b"hello"), "x.safetensors", "cannot read tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_lose_something_is_refused_with_its_line(case: str, tmp_path: Path) -> None:
    make, name, words = REFUSED[case]
    make(tmp_path / name)
    with pytest.raises(CalibrationError, match=rf"p\.jsonl:2: image: .*({words})"):
        lines(tmp_path, {"prompt": "a"}, {"prompt": "b", "image": name})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: (folder / "x.docx").write_text(""), "'x.docx' is neither"),
        (lambda folder: (folder / "lost.txt").write_text("a dog"), "'lost.txt' is neither"),
        (lambda folder: (folder / "deeper").mkdir(), "'deeper' is neither"),
        (lambda folder: picture().save(folder / "a.jpg"), "two files of one name"),
    ],
)
def test_a_folder_is_read_whole_or_not_at_all(make: Any, words: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    make(tmp_path)
    with pytest.raises(CalibrationError, match=words):
        read_conditions(tmp_path)


def test_opaque_and_turned_pictures_are_seen_as_they_are(tmp_path: Path) -> None:
    Image.new("RGBA", (6, 4), (9, 9, 9, 255)).save(tmp_path / "a.png")
    turned = picture()
    turned.getexif()[0x0112] = 6  # taken with the camera on its side
    turned.save(tmp_path / "b.jpg", exif=turned.getexif())
    assert stored(tmp_path / "a.png").open().mode == "RGB" and stored(tmp_path / "b.jpg").open().size == (4, 6)


def test_a_file_that_changes_while_it_is_in_use_is_an_error(folder: Path) -> None:
    value = stored(folder / "a.png")
    assert described(value) == described(picture()) and described(value) != described(stored(folder / "b.png"))
    picture(91).save(folder / "a.png")
    with pytest.raises(CalibrationError, match="was changed while it was in use"):
        value.open()


# ------------------------------------------------------------------------------------------------------------------ names of the call


@pytest.mark.parametrize(
    ("kind", "field", "file", "argument"),
    [
        (ImageToVideo, "image", "a.png", "image"),
        (ImageToVideo, "first_frame", "a.png", "image"),
        (ImageToVideo, "end_image", "a.png", "last_image"),
        (VideoToVideo, "video", "c.mp4", "video"),
        (VideoToVideo, "mask_image", "frames", "mask"),
        (VideoToVideo, "reference_image", "a.png", "reference_images"),
        (Controlled, "control_image", "a.png", "image"),
        (ControlledClip, "control_video", "frames", "conditioning_frames"),
        (ControlledClip, "video", "frames", "conditioning_frames"),
    ],
)
def test_fields_become_arguments_of_the_call(folder: Path, kind: type, field: str, file: str, argument: str) -> None:
    (one,) = fitted(kind, lines(folder, {"prompt": "a", field: file}))
    assert isinstance(one, Condition) and list(one.inputs) == [argument]
    assert fitted(kind, [one]) == [one]


WRONG: dict[str, tuple[type, dict[str, Any], str]] = {
    "unknown": (
        ImageToVideo,
        {"imag": "a.png"},
        r"takes no 'imag' for a clip; did you mean 'image'\? it takes image, negative_prompt, last_image$",
    ),
    "of another kind": (VideoToVideo, {"image": "a.png"}, "VideoToVideo takes no 'image' for a clip"),
    "no ControlNet": (ImageToVideo, {"control_image": "a.png"}, "takes no 'control_image'"),
    "of the run": (
        ImageToVideo,
        {"image": "a.png", "height": 64},
        "'height' is the same for all clips of a run; leave it out and give --height",
    ),
    "ours": (ImageToVideo, {"image": "a.png", "generator": 3}, "takes no 'generator'"),
    "twice": (ImageToVideo, {"image": "a.png", "first_image": "b.png"}, "'first_image' is a second value for 'image'"),
    "a clip for a picture": (ImageToVideo, {"image": "c.mp4"}, "'.*c.mp4' holds several pictures, and image takes one"),
    "a list for a picture": (ImageToVideo, {"image": ["a.png", "b.png"]}, "the list holds several pictures"),
    "a picture for a clip": (VideoToVideo, {"video": "a.png"}, "is one picture, and video takes the frames of a clip"),
    "a word": (ImageToVideo, {"image": "dog"}, "image: 'dog' is a text, and image takes a PIL image"),
    "a number": (ImageToVideo, {"image": 3}, "image takes a PIL image .*, got 3"),
    "no text": (ImageToVideo, {"image": "a.png", "negative_prompt": 3}, "negative_prompt is a text, got 3"),
    "a class by name": (Classes, {"class": "cat"}, "class is the number of a class, got 'cat'"),
    "half a class": (Classes, {"class": 1.5}, "class is the number of a class, got 1.5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_call_does_not_take_is_one_clear_error(folder: Path, case: str) -> None:
    kind, entry, words = WRONG[case]
    with pytest.raises((UnsupportedError, CalibrationError), match=words) as error:
        fitted(kind, lines(folder, {"prompt": "a"}, {"prompt": "b"} | entry if kind is not Classes else entry))
    assert "p.jsonl:2: " in str(error.value)


def test_clips_go_together_only_where_that_means_the_same() -> None:
    def of(**inputs: Any) -> Condition:
        return Condition("a", inputs=inputs)

    assert at_once(ImageToVideo, {}, 4, ["a", "b"]) == 4
    assert at_once(ImageToVideo, {}, 4, [of(negative_prompt="b"), of(negative_prompt="c")]) == 4
    assert at_once(ImageToVideo, {}, 4, [of(negative_prompt="b"), "c"]) == 1
    assert at_once(ImageToVideo, {}, 4, [of(image=1), of(image=2)]) == 1
    assert at_once(Classes, {}, 4, [of(class_labels=1), of(class_labels=2)]) == 4
    assert at_once(Classes, {}, 4, [of(class_labels=1, guidance_scale=2), of(class_labels=2, guidance_scale=3)]) == 1


# ------------------------------------------------------------------------------------------------------------------------- bundled ones


def test_bundled_pictures_and_clips_are_small_and_unlike_each_other() -> None:
    pictures, clips = own_pictures(), own_clips(21)
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 200_000
    assert len(pictures) == 6 and len({described(one) for one in pictures}) == 6
    assert [len(frames) for frames in clips] == [21, 21] and [len(frames) for frames in own_clips()] == [17, 17]
    assert described(clips[0][15]) == described(clips[0][17]) != described(clips[0][16])  # turns at the end
    levels = torch.tensor([np.asarray(one).mean() for one in pictures])
    assert levels.min() < 40 and levels.max() > 150


def test_conditions_without_a_text_are_told_where_the_pipeline_takes_one(caplog: pytest.LogCaptureFixture) -> None:
    from reelquant import _remarks
    from reelquant.models.sampling import sample
    from tests.tiny.conditioned import CASES, made

    _remarks._logged.clear()  # it is told once in a process
    with caplog.at_level(logging.WARNING, "reelquant"):
        sample(made("ltx_i2v"), [Condition(inputs={"image": picture()})], **CASES["ltx_i2v"].settings)
    assert "LTXImageToVideoPipeline takes a prompt; clips whose condition has none are made from an empty one" in caplog.text
