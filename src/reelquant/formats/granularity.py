"""Who shares a scale. A granularity turns a tensor into ``[units, members]`` and back; one scale belongs to one row.

| kind | units of a weight ``[64, 96, 3, 3]`` | units of an input ``[2, 16, 96]`` |
|---|---|---|
| tensor | 1 | 1 |
| channel | 64 (output channels) | 96 (input channels) |
| group-n | 64 * ceil(864 / n) | 32 * ceil(96 / n): n channels of a position |
| token | not used | 32 (every position) |
| sample | not used | 2 (every item of the leading axis: a picture of a 2-D convolution, a clip of a 3-D one) |
| frame-n | not used | n, the leading axis being ``batch * frames`` |
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant._errors import RecipeError, nearest
from reelquant.formats.scales import FLOAT, SCALES, check_scales

Kind = Literal["tensor", "channel", "group", "token", "sample", "frame"]
FRAMES = 100_000
KINDS: tuple[Kind, ...] = ("tensor", "channel", "group", "token", "sample", "frame")
FOUND_AT_RUN_TIME = ("token", "sample")  # kinds whose scales belong to the positions or items of one input, so no layer can store them


@dataclass(frozen=True)
class Granularity:
    """Which elements share a scale.

    Attributes:
        kind: one of :data:`KINDS`.
        size: members of a group, or number of frames; 0 where it has no meaning.
        axis: the channel axis: 0 for weights, -1 or 1 for inputs of linear layers or convolutions.
        scale: which numbers the scales are, ``float`` or a name of :data:`reelquant.formats.scales.SCALES`.
    """

    kind: Kind = "tensor"
    size: int = 0
    axis: int = 0
    scale: str = FLOAT

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(f"unknown granularity '{self.kind}'; {nearest(self.kind, KINDS)}")
        if self.kind in ("group", "frame") and self.size < 1:
            raise RecipeError(f"granularity '{self.kind}' needs a size, as in '{self.kind}-64'; got {self.size}")
        if self.kind == "frame" and self.size > FRAMES:
            raise RecipeError(f"granularity '{self}' is of clips of at most {FRAMES} frames")
        if self.kind not in ("group", "frame") and self.size:
            raise RecipeError(f"granularity '{self.kind}' takes no size, got '{self}'; sizes belong to group-n and frame-n")
        check_scales(self.scale, self.kind)

    def __str__(self) -> str:
        return f"{self.kind}-{self.size}" if self.size else self.kind

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of stored scales, which are rounded before codes are chosen: bfloat16 where there are many (groups, channels), else float32.

        Scales of eight bits are stored as bytes.
        """
        if self.scale != FLOAT:
            return torch.uint8
        return torch.bfloat16 if self.kind in ("group", "channel") else torch.float32

    @property
    def two_levels(self) -> bool:
        """Whether a float32 number for the whole tensor multiplies all scales."""
        return self.scale != FLOAT and SCALES[self.scale].two_levels

    def units(self, shape: tuple[int, ...]) -> int:
        """Number of scales of a weight ``[out, ...]``; of an input of ``(channels,)`` with static scales.

        Raises:
            RecipeError: for kinds whose scales depend on the size of an input.
        """
        if self.kind in FOUND_AT_RUN_TIME:
            raise RecipeError(f"granularity '{self.kind}' has a scale for every {self.kind} of an input; a layer cannot store them")
        width = math.prod(shape[1:])
        return {"tensor": 1, "channel": shape[0], "group": shape[0] * -(-width // max(self.size, 1)), "frame": self.size}[self.kind]

    def blocks(self, x: Tensor) -> Tensor:
        """``[units, members]``; a last group that is too short is padded with zeros (which every range includes)."""
        return _TO_BLOCKS[self.kind](x, self)

    def unblock(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Undo :meth:`blocks` for a tensor of this shape."""
        return _FROM_BLOCKS[self.kind](blocks, self, shape)


def parse_granularity(text: str, axis: int = 0, scale: str = FLOAT) -> Granularity:
    """Read ``tensor``, ``channel``, ``group-64``, ``token``, ``sample`` or ``frame-16``; ``scale`` says which numbers the scales are.

    Raises:
        RecipeError: if the text is none of these, or scales of eight bits are asked for where there are no groups.
    """
    match = re.fullmatch(r"([a-z]+)(?:-(\d{1,9}))?", text)
    if match is None:
        raise RecipeError(f"cannot read granularity '{text}'; known: tensor, channel, group-64, token, sample, frame-16")
    return Granularity(match[1], int(match[2] or 0), axis, scale)  # pyright: ignore[reportArgumentType]  (checked there)


def _group_blocks(x: Tensor, g: Granularity) -> Tensor:
    rows = x.flatten(1) if g.axis == 0 else _positions(x, g)
    size = _group_size(g, rows.shape[1])
    short = -rows.shape[1] % size
    return (F.pad(rows, (0, short)) if short else rows).reshape(-1, size)


def _group_size(g: Granularity, width: int) -> int:
    """A group is no wider than a row: padding it would cost memory and change nothing."""
    return max(min(g.size, width), 1)


def _group_unblock(blocks: Tensor, g: Granularity, shape: tuple[int, ...]) -> Tensor:
    moved = list(shape) if g.axis == 0 else _moved(shape, g.axis, -1)
    count, width = (shape[0], math.prod(shape[1:])) if g.axis == 0 else (math.prod(moved[:-1]), moved[-1])
    rows = blocks.reshape(count, width + -width % _group_size(g, width))[:, :width].reshape(moved)
    return rows if g.axis == 0 else rows.movedim(-1, g.axis)


def _positions(x: Tensor, g: Granularity) -> Tensor:
    """``[positions, channels]``."""
    moved = x.movedim(g.axis, -1)
    return moved.reshape(math.prod(moved.shape[:-1]), moved.shape[-1])


def _frame_blocks(x: Tensor, g: Granularity) -> Tensor:
    if x.shape[0] % g.size:
        raise RecipeError(f"granularity frame-{g.size} needs a leading axis of batch * {g.size}, got shape {tuple(x.shape)}")
    return x.reshape(x.shape[0] // g.size, g.size, math.prod(x.shape[1:])).transpose(0, 1).reshape(g.size, -1)


def _frame_unblock(blocks: Tensor, g: Granularity, shape: tuple[int, ...]) -> Tensor:
    return blocks.reshape(g.size, shape[0] // g.size, math.prod(shape[1:])).transpose(0, 1).reshape(shape)


def _moved(shape: tuple[int, ...], axis: int, to: int) -> list[int]:
    sizes = list(shape)
    sizes.insert(to % len(shape), sizes.pop(axis))
    return sizes


_TO_BLOCKS: dict[Kind, Callable[[Tensor, Granularity], Tensor]] = {
    "tensor": lambda x, g: x.reshape(1, -1),
    "channel": lambda x, g: x.movedim(g.axis, 0).reshape(x.shape[g.axis], -1),
    "group": _group_blocks,
    "token": _positions,
    "sample": lambda x, g: x.reshape(x.shape[0], math.prod(x.shape[1:])),
    "frame": _frame_blocks,
}
_FROM_BLOCKS: dict[Kind, Callable[[Tensor, Granularity, tuple[int, ...]], Tensor]] = {
    "tensor": lambda b, g, shape: b.reshape(shape),
    "channel": lambda b, g, shape: b.reshape(_moved(shape, g.axis, 0)).movedim(0, g.axis),
    "group": _group_unblock,
    "token": lambda b, g, shape: b.reshape(_moved(shape, g.axis, -1)).movedim(-1, g.axis),
    "sample": lambda b, g, shape: b.reshape(shape),
    "frame": _frame_unblock,
}
