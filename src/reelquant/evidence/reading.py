"""Reading clips that any program made. What cannot be read as it was meant is an error; nothing is taken for something else in silence.

Clips are ``[frames, 3, height, width]`` in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reelquant._errors import CheckpointError, nearest

PIXELS = 2**26  # of a picture; 8K has half as many
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")
"""Modes in which Pillow opens pictures of 16 bits; it clamps them to 8 bits if it is asked for RGB."""


def read_video(path: str | Path) -> Tensor:
    """Every frame of an MP4, GIF or other video file: ``[frames, 3, height, width]`` in [0, 1].

    Raises:
        CheckpointError: if the file does not exist, cannot be decoded, or is damaged or cut short as far as a decoder can tell.
    """
    import av

    _check_there(Path(path))
    try:
        with av.open(str(path)) as container:
            frames, problem = _decoded(container)
    except (av.error.FFmpegError, IndexError) as error:
        raise CheckpointError(f"cannot read '{path}' as a video: {error}") from error
    if problem:
        raise CheckpointError(f"'{path}' is damaged: {problem}; make or copy it again")
    if not frames:
        raise CheckpointError(f"'{path}' holds no frame; it may be cut short: write it again")
    return torch.stack(frames).permute(0, 3, 1, 2).float() / 255


def _check_there(path: Path) -> None:
    if not path.is_file():
        siblings = [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else []
        raise CheckpointError(f"no video at '{path}'; {nearest(path.name, siblings)}")


def _decoded(container: Any) -> tuple[list[Tensor], str]:
    """The frames, and what is wrong with them; decoders fill gaps with what was there before, and only mark such frames."""
    stream = container.streams.video[0]
    stream.codec_context.options = {"err_detect": "explode"}
    frames, packets, broken = list[Tensor](), 0, 0
    for packet in container.demux(stream):
        packets += packet.size > 0
        for frame in packet.decode():
            broken += packet.is_corrupt or frame.is_corrupt
            frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
    if broken:
        return frames, f"{broken} of its {len(frames)} frames are broken"
    if packets < stream.frames:  # 0 where the container does not say
        return frames, f"it says that it has {stream.frames} frames, and {packets} can be read"
    return frames, ""


def frame_rate(path: str | Path) -> float | None:
    """Frames per second that a video file asks for; None if it does not say."""
    import av

    _check_there(Path(path))
    try:
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate
    except (av.error.FFmpegError, IndexError) as error:
        raise CheckpointError(f"cannot read '{path}' as a video: {error}") from error
    return float(rate) if rate else None


def read_pictures(files: Sequence[Path]) -> Tensor:
    """Pictures as the frames of one clip, in the order given: ``[frames, 3, height, width]`` in [0, 1].

    Raises:
        CheckpointError: if one cannot be read or they differ in size.
    """
    from PIL import Image

    frames = []
    for file in files:
        try:
            with Image.open(file) as opened:
                frames.append(_picture(opened))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, MemoryError) as error:
            raise CheckpointError(f"cannot read '{file}' as a picture: {error}") from error
        if frames[-1].shape != frames[0].shape:
            sizes = " and ".join(f"{frame.shape[1]}x{frame.shape[0]}" for frame in (frames[0], frames[-1]))
            raise CheckpointError(f"'{file}' has another size than '{files[0].name}' ({sizes}); frames of a clip must be equal in size")
    return torch.stack(frames).permute(0, 3, 1, 2)


def _picture(opened: Any) -> Tensor:
    """float32 ``[height, width, 3]`` in [0, 1]."""
    from PIL import ImageOps

    if opened.width * opened.height > PIXELS:
        raise ValueError(f"it has {opened.width} x {opened.height} pixels, and a frame has at most {PIXELS}")
    if (count := getattr(opened, "n_frames", 1)) > 1:
        raise ValueError(f"it is a film of {count} pictures; convert it to MP4 or GIF")
    if opened.mode == "F":
        raise ValueError("it holds floats, and nothing says which of them are black and white; convert it to 8 or 16 bits")
    upright = ImageOps.exif_transpose(opened)
    if opened.mode in DEEP:
        grey = torch.from_numpy(np.array(upright).astype(np.float32) / 65535)
        return grey.clamp(0, 1)[..., None].expand(-1, -1, 3)
    return torch.from_numpy(np.array(upright.convert("RGB"))).float() / 255
