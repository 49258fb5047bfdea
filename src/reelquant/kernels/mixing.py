"""Linear operations on the channels of an input that come before its rotation, shift and scale, in any order and number.

Each keeps zero at zero, so padding a convolution before or after it is the same. A weight takes the opposite over: ``mix(x) . weight(W)``
is ``x . W``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from reelquant._errors import CheckpointError
from reelquant.kernels.hadamard import hadamard


class Mix(ABC):
    """One operation.

    Attributes:
        kind: its name in checkpoints, before the width of blocks.
        dtype: of the stored vector ``[channels]``; None if there is none.
    """

    kind: ClassVar[str]
    dtype: ClassVar[torch.dtype | None] = None

    @property
    def name(self) -> str:
        """As checkpoints write it."""
        return self.kind

    @property
    def vector(self) -> Tensor | None:
        """What is stored."""
        return None

    @abstractmethod
    def __call__(self, x: Tensor, dim: int = -1) -> Tensor:
        """Values with their channels along ``dim``, after the operation."""

    @abstractmethod
    def weight(self, weight: Tensor, dim: int = 1) -> Tensor:
        """The weight for the input after the operation, from the one for the input before it."""

    @abstractmethod
    def undone(self, weight: Tensor, dim: int = 1) -> Tensor:
        """The other way round."""


@dataclass(frozen=True, eq=False)
class Scaling(Mix):
    """Divide each channel by a number that is not zero; a negative one turns its sign."""

    scale: Tensor
    kind: ClassVar[str] = "scale"
    dtype: ClassVar[torch.dtype | None] = torch.bfloat16

    @property
    def vector(self) -> Tensor:
        return self.scale

    def __call__(self, x: Tensor, dim: int = -1) -> Tensor:
        return x / _along(self.scale, x, dim)

    def weight(self, weight: Tensor, dim: int = 1) -> Tensor:
        return weight * _along(self.scale, weight, dim)

    def undone(self, weight: Tensor, dim: int = 1) -> Tensor:
        return weight / _along(self.scale, weight, dim)


@dataclass(frozen=True, eq=False)
class Permutation(Mix):
    """Channel ``i`` becomes what channel ``order[i]`` was."""

    order: Tensor
    kind: ClassVar[str] = "permute"
    dtype: ClassVar[torch.dtype | None] = torch.int32

    @property
    def vector(self) -> Tensor:
        return self.order

    def __call__(self, x: Tensor, dim: int = -1) -> Tensor:
        return x.index_select(dim, self.order.to(x.device))

    def weight(self, weight: Tensor, dim: int = 1) -> Tensor:
        return self(weight, dim)

    def undone(self, weight: Tensor, dim: int = 1) -> Tensor:
        return weight.index_select(dim, self.order.argsort().to(weight.device))


@dataclass(frozen=True, eq=False)
class Rotation(Mix):
    """Multiply by :func:`reelquant.kernels.hadamard` in blocks; its own inverse.

    Attributes:
        block: width of the blocks, a power of two that divides the channels; 0 for the largest one.
    """

    block: int = 0
    kind: ClassVar[str] = "rotate"

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.block}" if self.block else self.kind

    def __call__(self, x: Tensor, dim: int = -1) -> Tensor:
        if not self.block:
            return hadamard(x, dim)
        parts = x.movedim(dim, -1).unflatten(-1, (-1, self.block))
        return hadamard(parts).flatten(-2).movedim(-1, dim)

    def weight(self, weight: Tensor, dim: int = 1) -> Tensor:
        return self(weight, dim)

    def undone(self, weight: Tensor, dim: int = 1) -> Tensor:
        return self(weight, dim)


def unmixed(weight: Tensor, mixes: Sequence[Mix]) -> Tensor:
    """The weight ``[out, channels, *kernel]`` for the input before all operations."""
    for mix in reversed(mixes):
        weight = mix.undone(weight)
    return weight


def _along(vector: Tensor, values: Tensor, dim: int) -> Tensor:
    vector = vector if vector.dtype == torch.float64 else vector.float()
    return vector.to(values.device).view(-1, *[1] * (values.ndim - 1 - dim % values.ndim))


WITH_VECTOR: dict[str, Callable[[Any], Mix]] = {"scale": Scaling, "permute": Permutation}
DTYPES = {kind.kind: kind.dtype for kind in (Scaling, Permutation, Rotation)}


def mix_dtype(name: str, channels: int) -> torch.dtype | None:
    """Dtype of the vector that belongs to a stored name; None if none does.

    Raises:
        CheckpointError: if this version does not know the name, or blocks do not divide the channels.
    """
    found = re.fullmatch(r"([a-z]+)(?:-(\d{1,6}))?", name)
    kind, block = (found[1], int(found[2] or 0)) if found else ("", 0)
    if kind not in DTYPES or (block and kind != Rotation.kind):
        raise CheckpointError(f"a layer mixes channels by '{name}', which this version does not know; known: {', '.join(DTYPES)}")
    if block and (channels % block or block & (block - 1)):
        raise CheckpointError(f"a layer rotates {channels} channels in blocks of {block}; a block is a power of two that divides them")
    return DTYPES[kind]


def read_mix(name: str, vector: Tensor | None) -> Mix:
    """The operation of a stored name (:func:`mix_dtype` has checked it)."""
    if name in WITH_VECTOR:
        return WITH_VECTOR[name](vector)
    return Rotation(int(name.partition("-")[2] or 0))
