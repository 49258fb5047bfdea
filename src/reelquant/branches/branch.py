"""The contract of a branch: tensors of its own beside a quantized layer, and a share of the layer's output."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from reelquant.clock import Moment
from reelquant.kernels import Window
from reelquant.stages import Stage, StageSite

Inner = Callable[[Tensor], Tensor]  # the rest of the layer: input -> output, without an activation


class TensorSpec(NamedTuple):
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Branch(Stage):
    """What a layer computes beside its quantized product. A member is a frozen dataclass whose fields are its options.

    As a stage of a recipe, a member overrides :meth:`~reelquant.stages.Stage.split` to take a part of the weight over, so one class
    holds both halves of a mechanism: how its tensors are found, and what a layer does with them.

    A member's tensors are buffers of the layer, ``<layer>.<name>`` in a checkpoint. They are saved, moved, copied and offloaded with the
    layer, and keep their dtype when a model is cast. The names must differ from those of the layer's other tensors.

    Attributes:
        exports: None if exporters may add :meth:`weight` to the float weight and round the sum, else the sentence that they refuse with.
        learns: names of the tensors that a reconstruction may train (``branch_rate``).
    """

    exports: ClassVar[str | None] = None
    learns: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Name, shape and dtype of every tensor, for a layer whose float weight has this shape."""

    def stored_bytes(self, site: StageSite) -> int:
        return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in self.tensors(site.layer.shape).values())

    @abstractmethod
    def run(self, inner: Inner, x: Tensor, moment: Moment, tensors: Mapping[str, Tensor], window: Window | None) -> Tensor:
        """The output of the layer before its activation.

        Args:
            inner: computes the rest of the layer.
            x: the input as the layer reads it: the layer has not rotated, shifted, scaled or rounded it. Linear: ``[..., in]``;
                convolutions: ``[N, in, *places]``, where ``N`` may be missing.
            moment: the denoising step and what else is known of the call.
            tensors: those of :meth:`tensors`, where the layer lies.
            window: how a convolution slides; None for a linear layer.
        """

    @abstractmethod
    def weight(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor | None:
        """The branch as a float32 weight of this shape that is multiplied with ``x`` of :meth:`run`; None if it is not a product."""
