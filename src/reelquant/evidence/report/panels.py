"""Clips of the report: float, quantized, their difference, the noise floor in one video, so that they cannot drift apart."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant._errors import MeasurementError
from reelquant.evidence.media import enlarge
from reelquant.evidence.report.data import MetricData

SMALL, LARGE = 192, 480  # pixels: clips below are enlarged by whole factors, clips above are shrunk
ALIGN = 16  # the codec works on squares of this side: panels that start on one do not bleed into each other
GAINS = (1, 2, 4, 8, 16, 32)
CRF = 14
BT601, FULL_BT709, SRGB, LIMITED = 6, 1, 13, 1  # H.273: the matrix that swscale uses, and sRGB pixels left as they are


@dataclass(frozen=True, eq=False)
class Panel:
    """One clip of the report.

    Attributes:
        name: of the clip, as in ``per_clip`` of the data.
        prompt, seed: what it was sampled from.
        figures: metric -> value for this clip.
        reference, test: ``[frames, 3, height, width]`` in [0, 1], of one shape.
        others: what further pipelines under test made, in the order of the page.
        floor: what shows the noise floor, if anything does.

    Raises:
        MeasurementError: if the clips differ in shape or are empty.
    """

    name: str
    prompt: str
    seed: int | None
    figures: Mapping[str, float | None]
    reference: Tensor
    test: Tensor
    others: Sequence[Tensor] = ()
    floor: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.reference.shape)
        unlike = [tuple(clip.shape) for clip in (self.test, *self.others, *self._floors) if tuple(clip.shape) != shape]
        if unlike:
            other = unlike[0]
            raise MeasurementError(
                f"clip '{self.name}' cannot be shown side by side: the reference is {shape}, the test {other}; give both one shape"
            )
        if len(shape) != 4 or shape[1] != 3 or not all(shape):
            raise MeasurementError(f"clip '{self.name}' must be [frames, 3, height, width] with at least one frame; it is {shape}")

    @property
    def _floors(self) -> list[Tensor]:
        return [] if self.floor is None else [self.floor]

    def pictures(self, frame: int, gain: int) -> list[Tensor]:
        """What is shown of a frame, each ``[1, 3, height, width]``: float, quantized, their difference ``0.5 + gain * (quantized - float)``
        if there is one quantized clip, else all of them, then the floor."""
        reference, *tests = (_plain(clip, frame) for clip in (self.reference, self.test, *self.others))
        difference = [0.5 + gain * (tests[0] - reference)] if not self.others else []
        return [reference, *tests, *difference, *(_plain(clip, frame) for clip in self._floors)]

    @property
    def count(self) -> int:
        """How many pictures are shown of a frame."""
        return 2 + (len(self.others) or 1) + len(self._floors)


def _plain(clip: Tensor, frame: int) -> Tensor:
    return clip[frame : frame + 1].detach().float().cpu().clamp(0, 1)


@dataclass(frozen=True)
class Embedded:
    """A panel as text for the page.

    Attributes:
        video: base64 of an MP4 whose frames hold ``count`` pictures in a row.
        still: base64 of a JPEG of the middle frame, for paper and for browsers that cannot play the video.
        width, height: of one picture.
        stride: from the left edge of one picture to that of the next.
    """

    name: str
    prompt: str
    seed: int | None
    frames: int
    count: int
    width: int
    height: int
    stride: int
    video: str = field(repr=False)
    still: str = field(repr=False)

    @property
    def size(self) -> int:
        """Characters it adds to the page."""
        return len(self.video) + len(self.still)


# ------------------------------------------------------------------------------------------------------------- pictures


def shown_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of one picture on the page, both even.

    Example:
        >>> shown_size(64, 64), shown_size(480, 832)
        ((192, 192), (276, 480))
    """
    factor = max(1, min(-(-SMALL // min(height, width)), LARGE // width))
    shown = min(width * factor, LARGE)
    return max(2, height * shown // width // 2 * 2), max(2, shown // 2 * 2)


def resized(picture: Tensor, height: int, width: int) -> Tensor:
    """``[..., 3, h, w]`` at another size: whole pixels upwards, antialiased downwards."""
    factor = max(1, round(width / picture.shape[-1]))
    if factor > 1:
        picture = enlarge(picture, factor)[..., :height, :width]
    if picture.shape[-2:] == (height, width):
        return picture
    return F.interpolate(picture, (height, width), mode="bilinear", antialias=True)


def best_gain(panels: Sequence[Panel]) -> int:
    """The largest amplification that keeps 99.5 % of the differences of a typical clip in the picture's range."""
    peaks = []
    for panel in panels:
        shown = slice(None, None, max(1, len(panel.test) // 8))
        gap = (panel.test[shown].float() - panel.reference[shown].float()).abs().flatten()
        gap = gap[:: max(1, gap.numel() // 100_000)]
        peaks.append(float(gap.kthvalue(max(1, int(0.995 * gap.numel()))).values))
    typical = sorted(peaks)[len(peaks) // 2] if peaks else 0.0
    return max((gain for gain in GAINS if gain * typical <= 0.5), default=1)


def strips(panel: Panel, gain: int) -> Iterator[Tensor]:
    """Per frame uint8 ``[height, count * stride, 3]``: the pictures of a panel in a row."""
    height, width = shown_size(*panel.reference.shape[-2:])
    padding = (0, -width % ALIGN, 0, 0)
    for frame in range(len(panel.reference)):
        row = [resized(picture, height, width) for picture in panel.pictures(frame, gain)]
        strip = torch.cat([F.pad(picture, padding, mode="replicate") for picture in row], -1)[0]
        yield (strip.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()


# ---------------------------------------------------------------------------------------------------------------- files


def encode(frames: Sequence[Tensor], fps: float) -> bytes:
    """H.264 in MP4; every frame can be reached from a key frame at most eight frames before it.

    Args:
        frames: uint8 ``[height, width, 3]``, even sides.
        fps: frames per second.
    """
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"crf": str(CRF), "preset": "medium", "g": "8", "bf": "0", "tune": "animation"}
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.height, stream.width, stream.pix_fmt = frames[0].shape[0], frames[0].shape[1], "yuv420p"
        stream.thread_count = 1  # the same bytes on every machine
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = (
            BT601,
            FULL_BT709,
            SRGB,
            LIMITED,
        )
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def jpeg(frame: Tensor) -> bytes:
    """A frame, uint8 ``[height, width, 3]``, as a small picture."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame.numpy()).save(file, "JPEG", quality=82)
    return file.getvalue()


def embed(panel: Panel, gain: int, fps: float) -> Embedded:
    """A panel as text for the page."""
    frames = list(strips(panel, gain))
    height, width = shown_size(*panel.reference.shape[-2:])
    video, still = (base64.b64encode(content).decode("ascii") for content in (encode(frames, fps), jpeg(frames[len(frames) // 2])))
    return Embedded(
        panel.name,
        panel.prompt,
        panel.seed,
        len(frames),
        panel.count,
        width,
        height,
        frames[0].shape[1] // panel.count,
        video,
        still,
    )


def embed_within(panels: Sequence[Panel], gain: int, fps: float, limit: float) -> list[Embedded]:
    """Panels in order until they fill ``limit`` characters; the first is always there."""
    found: list[Embedded] = []
    used = 0
    for panel in panels:
        made = embed(panel, gain, fps)
        used += made.size
        if found and used > limit:
            break
        found.append(made)
    return found


# ---------------------------------------------------------------------------------------------------------------- order


def worst_first(panels: Sequence[Panel], metrics: Mapping[str, MetricData]) -> tuple[list[Panel], str | None]:
    """Panels from worst to best, and the metric that orders them: the first of ``metrics`` that every clip has.

    Without one the order stays and the metric is None.
    """
    for name, metric in metrics.items():
        values = [panel.figures.get(name) for panel in panels]
        if metric.better in BADNESS and panels and all(isinstance(value, int | float) for value in values):
            bad = BADNESS[metric.better]
            return sorted(panels, key=lambda panel: bad(float(panel.figures[name] or 0.0)), reverse=True), name
    return list(panels), None


BADNESS = {
    "higher": lambda value: -value,
    "lower": lambda value: value,
    "zero": abs,
    "one": lambda value: abs(value - 1),
}
