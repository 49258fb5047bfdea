"""Folders of clips: finding clips, pairing those of two folders by name, and reading them one at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from reelquant._errors import CheckpointError, nearest
from reelquant._remarks import remark
from reelquant.evidence.reading import frame_rate, read_pictures, read_video

VIDEOS = (".mp4", ".gif", ".webm", ".mov", ".mkv", ".avi", ".m4v")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
TEXTS = ("", ".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".html", ".yaml", ".yml", ".log")  # what lies beside clips
SHOWN = 3  # names in a sentence
RATE = 1.1  # how far apart frame rates are the same: those of GIFs are rounded to hundredths of a second
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
        return read_video(self.files[0]) if self._is_video else read_pictures(self.files)

    def rate(self) -> float | None:
        """Frames per second; None for pictures, and for videos that do not say."""
        return frame_rate(self.files[0]) if self._is_video else None

    @property
    def _is_video(self) -> bool:
        return self.files[0].suffix.lower() in VIDEOS


def find_clips(folder: str | Path) -> dict[str, Clip]:
    """All clips of a folder by name, sorted: videos, numbered pictures (``a-000.png`` ...), subfolders of pictures.

    What else lies there is remarked, but for texts.

    Raises:
        CheckpointError: if the folder does not exist, holds no clip, or two files claim one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        siblings = [one.name for one in folder.parent.glob("*") if one.is_dir()] if folder.parent.is_dir() else []
        raise CheckpointError(f"no folder of clips at '{folder}'; {nearest(folder.name, siblings)}")
    found, unread = _looked_at(folder)
    _tell(folder, found, unread)
    clips: dict[str, Clip] = {}
    for clip in sorted(found, key=lambda one: one.name):
        if clip.name in clips:
            raise CheckpointError(f"two clips are called '{clip.name}': '{clips[clip.name].files[0]}' and '{clip.files[0]}'; rename one")
        clips[clip.name] = clip
    if not clips:
        kinds = f"{', '.join(VIDEOS)}, or pictures like clip-000.png"
        there = f" (not read: {_some(unread)})" if unread else ""
        raise CheckpointError(f"no clip in '{folder}'{there}; it should hold {kinds}")
    return clips


def _looked_at(folder: Path) -> tuple[list[Clip], list[str]]:
    """Clips, and names of what is not read, with the reason."""
    files = sorted(one for one in folder.iterdir() if not one.name.startswith("."))
    found = [Clip(file.stem, (file,)) for file in files if file.suffix.lower() in VIDEOS and file.is_file()]
    found += [Clip(name, frames) for name, frames in _sequences(files).items()]
    unread = [file.name for file in files if file.is_file() and file.suffix.lower() not in (*VIDEOS, *PICTURES, *TEXTS)]
    for inner in (file for file in files if file.is_dir()):
        clip, reason = _folder_of_pictures(inner)
        found += [clip] if clip else []
        unread += [f"{inner.name}/ ({reason})"] if reason else []
    return found, unread


def _folder_of_pictures(folder: Path) -> tuple[Clip | None, str]:
    """A folder inside of a folder of clips is one clip if all in it is numbered pictures with one name; else, why it is not read."""
    files = sorted(one for one in folder.iterdir() if not one.name.startswith("."))
    pictures = [file for file in files if file.suffix.lower() in PICTURES and file.is_file()]
    numbered = {match["clip"] for file in pictures if (match := NUMBERED.match(file.stem))}
    if len(pictures) > 1 and (len(numbered) > 1 or not all(NUMBERED.match(file.stem) for file in pictures)):
        return None, f"{len(pictures)} pictures that are not the numbered frames of one clip"
    others = [file.name for file in files if file not in pictures and (file.is_dir() or file.suffix.lower() not in TEXTS)]
    clip = Clip(folder.name, tuple(sorted(pictures, key=_order))) if pictures else None
    return clip, f"in it: {_some(others)}" if others else ""


def _tell(folder: Path, found: list[Clip], unread: list[str]) -> None:
    """Remark what may not be meant so."""
    if unread:
        remark(f"not read in '{folder}': {_some(unread)}; clips are videos, numbered pictures, or folders of them, in the folder itself")
    if len(found) == 1 and len(files := found[0].files) > 1 and files[0].parent == folder:
        remark(
            f"the {len(files)} numbered pictures in '{folder}' are read as the frames of one clip; "
            "if each is a clip of its own, give each a name that does not end in a number, or a folder"
        )


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"


def unequal_rates(reference: Mapping[str, Clip], test: Mapping[str, Clip]) -> list[str]:
    """A sentence if clips of one name, or without common names two sets of clips, play at different speeds."""
    rates = {side: {name: clip.rate() for name, clip in clips.items()} for side, clips in (("reference", reference), ("test", test))}
    first, second = ({name: rate for name, rate in one.items() if rate} for one in rates.values())
    common = [name for name in second if name in first]
    pairs = [(name, first[name], second[name]) for name in common] or [
        (name, before, after) for (name, after), before in zip(second.items(), first.values(), strict=False)
    ]
    other = [(name, before, after) for name, before, after in pairs if max(before, after) > RATE * min(before, after)]
    if not other:
        return []
    name, before, after = other[0]
    return [
        f"{len(other)} clips play at another speed than the reference's ('{name}': {after:.4g} frames per second, not {before:.4g}): "
        "they are compared frame by frame, whatever moment a frame shows"
    ]


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
