"""A small network that says what a clip of the moving-shapes world shows, so that a generated clip can be held against its caption.

It was trained on rendered clips only (``training/judge.py``), degraded by blur, noise and the like, and never saw a generated one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from reelquant.models.shapes import BACKGROUNDS, COLORS, DIGITS, MOTIONS, OBJECTS, SIZES, Scene, parse_caption

KINDS: dict[str, tuple[str, ...]] = {
    "shape": OBJECTS,
    "color": tuple(COLORS),
    "motion": tuple(MOTIONS),
    "background": BACKGROUNDS,
    "size": tuple(SIZES),
}
WEIGHTS = Path(__file__).parent / "weights" / "judge.safetensors"
RESOLUTION = 64
MOMENTS = 8  # the clip's features are resampled to this many moments, so any number of frames will do


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Judge(nn.Module):
    """Names the object, colour, motion, background and size in clips: convolutions on every frame, then a look across time.

    About 0.5 M parameters and 6 ms a clip of 13 frames on one core.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Sequential(
            _convolution(3, 32, 5, 2),
            _convolution(32, 64, 3, 2),
            _convolution(64, 96, 3, 2),
            _convolution(96, 96, 3, 1),
        )
        self.where = nn.Sequential(nn.Conv2d(96, 12, 1), nn.Flatten(), nn.Linear(12 * 64, 64))
        self.what = nn.Sequential(nn.Linear(2 * 96, 128), nn.ReLU(), nn.Linear(128, 128))
        self.time = nn.Sequential(nn.Linear(MOMENTS * (64 + 32), 128), nn.ReLU())
        self.summary = nn.Linear(128, 32)
        self.heads = nn.ModuleDict({kind: nn.Linear(128 + 128, len(words)) for kind, words in KINDS.items()})

    def features(self, clips: Tensor) -> Tensor:
        """What the heads see: ``[n, 256]``, also good for distances between sets of clips.

        Args:
            clips: ``[n, frames, 3, h, w]`` in [0, 1]; other sizes than 64x64 are resized.
        """
        n, frames = clips.shape[:2]
        pictures = clips.flatten(0, 1)
        if pictures.shape[-2:] != (RESOLUTION, RESOLUTION):
            pictures = F.interpolate(pictures, (RESOLUTION, RESOLUTION), mode="bilinear", antialias=True)
        maps = self.frames(pictures * 2 - 1)
        what = self.what(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)).unflatten(0, (n, frames))
        where = self.where(maps).unflatten(0, (n, frames))
        course = torch.cat([where, self.summary(what)], 2).mT
        course = F.interpolate(course, MOMENTS, mode="linear", align_corners=True)
        return torch.cat([F.relu(what).mean(1), self.time(course.flatten(1))], 1)

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """Logits ``[n, words]`` of every kind in :data:`KINDS`, for clips ``[n, frames, 3, h, w]`` in [0, 1]."""
        features = self.features(clips)
        return {kind: head(features) for kind, head in self.heads.items()}

    @torch.no_grad()
    def predict(self, clips: Tensor, batch_size: int = 16) -> dict[str, list[str]]:
        """The likeliest word of every kind for every clip.

        Args:
            clips: ``[n, frames, 3, h, w]`` in [0, 1], 8 to 16 frames.
            batch_size: clips looked at together; no influence on the answer.

        Returns:
            For each of ``shape`` (digits included), ``color``, ``motion``, ``background`` and ``size``: n words.
        """
        parameter = next(self.parameters())
        words: dict[str, list[str]] = {kind: [] for kind in KINDS}
        for part in clips.split(batch_size):
            for kind, logits in self(part.to(parameter)).items():
                words[kind] += [KINDS[kind][i] for i in logits.argmax(1).tolist()]
        return words


@functools.lru_cache(maxsize=1)
def load_judge() -> Judge:
    """The trained judge, in float32 on the CPU, in evaluation mode; the same object every time."""
    judge = Judge()
    judge.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in load_file(WEIGHTS).items()})
    return judge.eval().requires_grad_(False)


def _stated(truth: str | Scene) -> dict[str, str]:
    return parse_caption(truth.caption() if isinstance(truth, Scene) else truth)


def accuracy(clips: Tensor, truths: Sequence[str | Scene], judge: Judge | None = None) -> dict[str, float]:
    """How often the clips show what their captions say.

    Args:
        clips: ``[n, frames, 3, h, w]`` in [0, 1].
        truths: n captions or scenes; what a caption leaves out is not counted.
        judge: another judge than the bundled one.

    Returns:
        Fractions right for ``color``, ``shape`` (clips of circle to heart), ``digit`` (clips of digits), ``motion``, ``background``
        and ``size``; kinds that no caption states are absent.
    """
    predicted = (judge or load_judge()).predict(clips)
    right: dict[str, list[bool]] = {kind: [] for kind in ("color", "shape", "digit", "motion", "background", "size")}
    for i, truth in enumerate(truths):
        for kind, word in _stated(truth).items():
            right["digit" if word in DIGITS else kind].append(predicted[kind][i] == word)
    return {kind: sum(hits) / len(hits) for kind, hits in right.items() if hits}
