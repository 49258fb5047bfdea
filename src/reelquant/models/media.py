"""Pictures, clips and tensors in files, as conditions of clips: looked at when a file of conditions is read, opened when a clip is made.

Files are opened as they are or not at all: what a pipeline would not see (a second frame, transparency, half of 16 bits) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from reelquant._errors import CalibrationError
from reelquant.models.described import described

PIXELS = 2**26  # of a picture; 8K has half as many
FRAMES = 10_000  # of a clip
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
TENSORS = (".safetensors",)
MODES = ("1", "L", "P", "RGB", "LA", "PA", "RGBA")  # what PIL turns into RGB without a loss, but for transparency
KINDS = f"a picture ({', '.join(PICTURES)}), a clip ({', '.join(CLIPS)}), a folder of frames, or a tensor ({TENSORS[0]})"


@dataclass(frozen=True)
class Stored:
    """A value in a file, in memory only while a clip is made from it.

    Attributes:
        path: of the file, or of a folder of frames.
        kind: ``picture``, ``frames`` or ``tensor``.
        words: what :func:`~reelquant.models.described.described` says of the content, with its SHA-256.
    """

    path: Path
    kind: str
    words: Any

    def open(self) -> Any:
        """A PIL image, a list of them, or a tensor (a list of tensors if the file holds several).

        Raises:
            CalibrationError: if the file is not what it was when it was first read.
        """
        kind, value = _opened(self.path)
        if (kind, described(value)) != (self.kind, self.words):
            raise CalibrationError(f"'{self.path}' was changed while it was in use; start again")
        return value

    def __described__(self) -> Any:
        """The content, not the path: equal files are equal conditions."""
        return self.words


def stored(path: Path) -> Stored:
    """Look at a file.

    Raises:
        CalibrationError: if it does not exist, is broken, or would lose something.
    """
    kind, value = _opened(path)
    return Stored(path, kind, described(value))


def opened(value: Any) -> Any:
    """The value itself, or what is in its file; the same for the entries of a list."""
    if isinstance(value, Stored):
        return value.open()
    return [opened(one) for one in value] if isinstance(value, list) else value


def is_file_name(text: str) -> bool:
    """Whether a text ends like a file that can be a condition."""
    return Path(text).suffix.lower() in READERS


def _opened(path: Path) -> tuple[str, Any]:
    if path.is_dir():
        return "frames", _folder(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise CalibrationError(f"'{path}' is not a file that clips are made from; give {KINDS}")
    if not path.is_file():
        raise CalibrationError(f"no file at '{path}'")
    return reader(path)


def _picture(path: Path) -> tuple[str, Any]:
    """One picture, or the frames of an animated one."""
    try:
        with Image.open(path) as file:
            if file.width * file.height > PIXELS:
                raise ValueError(f"it has {file.width} x {file.height} pixels, and a picture has at most {PIXELS}")
            count = getattr(file, "n_frames", 1)
            if count > FRAMES:
                raise ValueError(f"it has {count} frames, and a clip has at most {FRAMES}")
            frames = []
            for number in range(count):
                file.seek(number)
                frames.append(_rgb(file))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, MemoryError) as error:
        raise CalibrationError(f"cannot use '{path}' as a picture: {error}") from None
    return ("picture", frames[0]) if count == 1 else ("frames", frames)


def _rgb(file: Image.Image) -> Image.Image:
    """The picture upright, in RGB.

    Raises:
        ValueError: if it holds more than 8 bits of three colours.
    """
    deep = any(";16" in str(tile) for tile in getattr(file, "tile", ()))
    if file.mode not in MODES or deep:
        raise ValueError(f"it is stored as {'16-bit ' if deep else ''}{file.mode}, of which a pipeline sees a part; save it as 8-bit RGB")
    upright = ImageOps.exif_transpose(file)
    if upright.has_transparency_data:
        low = upright.convert("RGBA").getchannel("A").getextrema()[0]
        if low != 255:
            raise ValueError("parts of it are transparent, which a pipeline does not see; put it on a background")
    return upright.convert("RGB")


def _clip(path: Path) -> tuple[str, Any]:
    """Every frame of a clip."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if stream.width * stream.height > PIXELS:
                raise ValueError(f"its frames have {stream.width} x {stream.height} pixels, and at most {PIXELS} are read")
            expected, frames = stream.frames, []
            for frame in container.decode(stream):
                frames.append(frame.to_image())
                if len(frames) > FRAMES:
                    raise ValueError(f"it has more than {FRAMES} frames")
    except (av.error.FFmpegError, OSError, IndexError, ValueError) as error:
        raise CalibrationError(f"cannot use '{path}' as a clip: {error}") from None
    if not frames or len(frames) < expected:
        raise CalibrationError(f"'{path}' says that it has {expected} frames and gives {len(frames)}; it is cut or broken: write it again")
    return "frames", frames


def _folder(path: Path) -> list[Image.Image]:
    """The frames of a folder, by name."""
    files = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
    if not files:
        raise CalibrationError(f"folder '{path}' holds no frame")
    frames = []
    for file in files:
        kind, value = _picture(file) if file.suffix.lower() in PICTURES else ("", None)
        if kind != "picture":
            raise CalibrationError(f"folder '{path}' is read as the frames of a clip, and '{file.name}' is not a single picture")
        frames.append(value)
    if len({frame.size for frame in frames}) > 1:
        raise CalibrationError(f"the pictures of folder '{path}' are not equal in size; frames of a clip must be")
    return frames


def _tensor(path: Path) -> tuple[str, Any]:
    """The tensor of a file, or all of them in the order of their names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CalibrationError(f"cannot read tensors from '{path}': {error}") from None
    if not found:
        raise CalibrationError(f"'{path}' holds no tensor")
    tensors = [found[name] for name in sorted(found, key=_natural)]
    return "tensor", tensors[0] if len(tensors) == 1 else tensors


def _natural(name: str) -> tuple[int, str]:
    """Sorts 2 before 10."""
    return (int(name), "") if name.isdecimal() else (-1, name)


READERS: dict[str, Callable[[Path], tuple[str, Any]]] = {
    **dict.fromkeys(PICTURES, _picture),
    **dict.fromkeys(CLIPS, _clip),
    **dict.fromkeys(TENSORS, _tensor),
}


def holds(value: Any) -> Sequence[str]:
    """What a value from a file holds: the kind of a stored one, those of a list's entries."""
    if isinstance(value, list):
        return [kind for one in value for kind in holds(one)]
    return [value.kind] if isinstance(value, Stored) else []
