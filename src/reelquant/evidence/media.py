"""Clips as files a person can open: MP4, GIF and PNG, contact sheets, and clips side by side. :mod:`reelquant.evidence.reading` reads.

Clips are ``[frames, 3, height, width]`` in [0, 1] everywhere; values outside are clamped.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant._errors import CheckpointError
from reelquant._remarks import remark

FPS = 8
GAP = 4  # pixels between pictures
PAPER, INK, QUIET = (255, 255, 255), (20, 20, 20), (110, 110, 110)


def pixels(clip: Tensor) -> Tensor:
    """uint8 ``[frames, height, width, 3]`` of a clip."""
    return (clip.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def enlarge(clip: Tensor, factor: int) -> Tensor:
    """Every pixel as a square of ``factor`` pixels; any leading axes before ``[height, width]``."""
    return clip.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


# ---------------------------------------------------------------------------------------------------------------- files


def check_video(path: str | Path) -> Path:
    """The path, if its ending names a kind of file that :func:`write_video` writes.

    Raises:
        CheckpointError: naming the endings that work.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITERS:
        raise CheckpointError(f"cannot tell the kind of video from '{path.name}'; end it in {', '.join(WRITERS)}")
    return path


def write_video(clip: Tensor, path: str | Path, fps: float = FPS, *, lossless: bool = False) -> list[Path]:
    """Write a clip. The ending chooses the kind: ``.mp4`` (H.264), ``.gif`` (endless), ``.png`` (a file per frame).

    Files appear complete or not at all; folders on the way are made.

    Args:
        clip: ``[frames, 3, height, width]`` in [0, 1].
        path: of the file; ``clip.png`` gives ``clip-000.png``, ``clip-001.png`` ...
        fps: frames per second; ignored for PNG.
        lossless: MP4 keeps every 8-bit pixel (H.264 in RGB, which browsers, VLC and mpv play and some players do not).

    Returns:
        The files written.

    Raises:
        CheckpointError: for another ending, or if the file cannot be written.
    """
    path = check_video(path)
    suffix = path.suffix.lower()
    files = frame_paths(path, len(clip)) if suffix == ".png" else [path]
    partial = [file.with_name(f".{file.stem}.{uuid.uuid4().hex[:8]}{suffix}") for file in files]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = _write_lossless if lossless and suffix == ".mp4" else WRITERS[suffix]
        writer(pixels(clip), partial, fps)
        for source, target in zip(partial, files, strict=True):
            os.replace(source, target)
    except OSError as error:
        raise CheckpointError(f"cannot write '{path}': {error}") from error
    finally:
        for file in partial:
            with suppress(OSError):
                file.unlink()
    return files


def frame_paths(path: Path, frames: int) -> list[Path]:
    """Names of numbered pictures: ``clip.png`` -> ``clip-000.png`` ..."""
    return [path.with_name(f"{path.stem}-{i:03d}{path.suffix}") for i in range(frames)]


def _write_mp4(frames: Tensor, files: list[Path], fps: float) -> None:
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:  # also by other programs: H.264 players want even sides
        made = f"{width + width % 2}x{height + height % 2}"
        remark(f"clips of {width}x{height} pixels are {made} in MP4 files, which have even sides: the last row or column is there twice")
    padded = F.pad(
        frames.permute(0, 3, 1, 2).float(),
        (0, frames.shape[2] % 2, 0, frames.shape[1] % 2),
        mode="replicate",
    )
    _encode(
        padded.byte().permute(0, 2, 3, 1),
        files[0],
        fps,
        "libx264",
        "yuv420p",
        {"crf": "12"},
    )  # shares colour between 2x2 pixels


def _write_lossless(frames: Tensor, files: list[Path], fps: float) -> None:
    _encode(frames, files[0], fps, "libx264rgb", "rgb24", {"qp": "0"})


def _encode(frames: Tensor, file: Path, fps: float, codec: str, layout: str, options: dict[str, str]) -> None:
    import av

    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream(
            codec,
            rate=Fraction(fps).limit_denominator(1001),
            options=options | {"preset": "medium"},
        )
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], layout
        stream.thread_count = 1  # the same bytes on every machine
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.contiguous().numpy(), format="rgb24")))
        container.mux(stream.encode())


def _write_gif(frames: Tensor, files: list[Path], fps: float) -> None:
    from PIL import Image

    first, *others = [Image.fromarray(frame.numpy()).quantize(colors=256, dither=Image.Dither.NONE) for frame in frames]
    first.save(files[0], save_all=True, append_images=others, duration=round(1000 / fps), loop=0, disposal=1)


def _write_png(frames: Tensor, files: list[Path], fps: float) -> None:
    from PIL import Image

    for frame, file in zip(frames, files, strict=True):
        Image.fromarray(frame.numpy()).save(file)


WRITERS: dict[str, Callable[[Tensor, list[Path], float], None]] = {
    ".mp4": _write_mp4,
    ".gif": _write_gif,
    ".png": _write_png,
}


# ------------------------------------------------------------------------------------------------------- pages of clips


def font(size: int) -> Any:
    """The font that comes with pillow."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def wrapped(text: str, width: int, size: int) -> list[str]:
    """Lines of at most ``width`` pixels; line breaks in the text stay."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font(size).getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


def write_text(draw: Any, corner: tuple[int, int], text: str, width: int, size: int = 15) -> None:
    """Text from a corner down; the first line dark, the others lighter and a little smaller."""
    left, top = corner
    for number, paragraph in enumerate(text.split("\n")):
        small = size if number == 0 else size - 2
        for line in wrapped(paragraph, width, small):
            draw.text((left, top), line, fill=INK if number == 0 else QUIET, font=font(small))
            top += small + 4


def contact_sheet(
    clips: Sequence[Tensor],
    path: str | Path,
    labels: Sequence[str],
    captions: Sequence[str],
    *,
    frames: int = 4,
    title: str = "",
) -> Path:
    """A page with a row per variant and, side by side, some frames of the same clips.

    Args:
        clips: per variant ``[clips, frames, 3, height, width]`` in [0, 1].
        path: of the PNG.
        labels: per variant; the first line is the name.
        captions: per clip, above its column.
        frames: shown of each clip, evenly spaced from first to last.
        title: above everything.

    Returns:
        The path.
    """
    from PIL import Image, ImageDraw

    shown = torch.linspace(0, clips[0].shape[1] - 1, min(frames, clips[0].shape[1])).round().long()
    factor = max(1, round(96 / clips[0].shape[-2]))
    strips = [[enlarge(clip[shown], factor) for clip in variant] for variant in clips]
    height, width = strips[0][0].shape[-2:]
    column, margin, band, head = len(shown) * (width + 1), 190, 40, 34 if title else 8
    page = Image.new(
        "RGB",
        (margin + len(captions) * (column + 3 * GAP), head + band + len(clips) * (height + GAP)),
        PAPER,
    )
    draw = ImageDraw.Draw(page)
    draw.text((10, 8), title, fill=INK, font=font(18))
    for x, caption in enumerate(captions):
        write_text(draw, (margin + x * (column + 3 * GAP), head + 2), caption, column)
    for y, (label, row) in enumerate(zip(labels, strips, strict=True)):
        top = head + band + y * (height + GAP)
        write_text(draw, (10, top + 4), label, margin - 16)
        for x, strip in enumerate(row):
            for k, frame in enumerate(pixels(strip)):
                page.paste(Image.fromarray(frame.numpy()), (margin + x * (column + 3 * GAP) + k * (width + 1), top))
    path = Path(path)
    page.save(path)
    return path


def side_by_side(clips: Sequence[Tensor], labels: Sequence[str], *, factor: int = 2, loops: int = 1) -> Tensor:
    """One clip in which a column per variant plays the same scenes, a row each.

    Args:
        clips: per variant ``[clips, frames, 3, height, width]`` in [0, 1].
        labels: per variant, above its column; the first line is the name.
        factor: enlargement.
        loops: how many times the scenes play.

    Returns:
        ``[frames * loops, 3, height, width]`` in [0, 1]; sides are even.
    """
    from PIL import Image, ImageDraw

    columns = [torch.cat([F.pad(enlarge(clip, factor), (0, GAP, 0, GAP), value=1.0) for clip in variant], -2) for variant in clips]
    body = torch.cat(columns, -1).float().cpu()
    band = 40
    header = Image.new("RGB", (body.shape[-1], band), PAPER)
    draw = ImageDraw.Draw(header)
    for x, label in enumerate(labels):
        write_text(draw, (x * columns[0].shape[-1] + 2, 3), label, columns[0].shape[-1] - GAP, size=14)
    top = torch.frombuffer(bytearray(header.tobytes()), dtype=torch.uint8).reshape(band, -1, 3).permute(2, 0, 1).float() / 255
    whole = torch.cat([top.expand(len(body), -1, -1, -1), body], -2)
    return F.pad(whole, (0, whole.shape[-1] % 2, 0, whole.shape[-2] % 2), value=1.0).repeat(loops, 1, 1, 1)
