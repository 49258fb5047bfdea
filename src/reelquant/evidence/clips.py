"""Folders of clips: finding clips, pairing those of two folders by name, and reading them one at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from reelquant._errors import CheckpointError, nearest
from reelquant.evidence.media import read_pictures, read_video

VIDEOS = (".mp4", ".gif", ".webm", ".mov", ".mkv", ".avi")
PICTURES = (".png",)
NUMBERED = re.compile(r"^(?P<clip>.*?)[-_. ]?(?P<number>\d+)$")  # clip-003.png


@dataclass(frozen=True)
class Clip:
    """A clip on disk.

    Attributes:
        name: by which clips of two folders are paired: the file without its ending, or the folder of the frames.
        files: one video, or a picture per frame in order.
    """

    name: str
    files: tuple[Path, ...]

    def read(self) -> Tensor:
        """``[frames, 3, height, width]`` in [0, 1]."""
        return read_video(self.files[0]) if self.files[0].suffix.lower() in VIDEOS else read_pictures(self.files)


def find_clips(folder: str | Path) -> dict[str, Clip]:
    """All clips of a folder by name, sorted: videos, numbered pictures (``a-000.png`` ...), subfolders of pictures.

    Raises:
        CheckpointError: if the folder does not exist, holds no clip, or two files claim one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        siblings = [one.name for one in folder.parent.glob("*") if one.is_dir()] if folder.parent.is_dir() else []
        raise CheckpointError(f"no folder of clips at '{folder}'; {nearest(folder.name, siblings)}")
    files = sorted(one for one in folder.iterdir() if not one.name.startswith("."))
    found = [Clip(file.stem, (file,)) for file in files if file.suffix.lower() in VIDEOS]
    found += [Clip(name, frames) for name, frames in _sequences(files).items()]
    for inner in files:
        pictures = sorted((one for one in inner.iterdir() if one.suffix.lower() in PICTURES), key=_order) if inner.is_dir() else []
        found += [Clip(inner.name, tuple(pictures))] if pictures else []
    clips: dict[str, Clip] = {}
    for clip in sorted(found, key=lambda one: one.name):
        if clip.name in clips:
            raise CheckpointError(f"two clips are called '{clip.name}': '{clips[clip.name].files[0]}' and '{clip.files[0]}'; rename one")
        clips[clip.name] = clip
    if not clips:
        kinds = f"{', '.join(VIDEOS)}, or PNG frames like clip-000.png"
        raise CheckpointError(f"no clip in '{folder}'; it should hold {kinds}")
    return clips


def _sequences(files: list[Path]) -> dict[str, tuple[Path, ...]]:
    """Numbered pictures, by the name before the number."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix.lower() in PICTURES and file.is_file():
            match = NUMBERED.match(file.stem)
            groups.setdefault((match["clip"] or "frames") if match else file.stem, []).append(file)
    return {name: tuple(sorted(frames, key=_order)) for name, frames in groups.items()}


def _order(file: Path) -> tuple[int, str]:
    match = NUMBERED.match(file.stem)
    return (int(match["number"]) if match else -1), file.name


def unpaired(reference: Mapping[str, Clip], test: Mapping[str, Clip]) -> list[str]:
    """Names that only one of two folders has, sorted."""
    return sorted(set(reference) ^ set(test))
