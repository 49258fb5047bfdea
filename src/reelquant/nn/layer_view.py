"""What the parts of a quantized layer see of it: its links, what holds its weight, and graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from reelquant.branches import Branch
from reelquant.clock import Clock, Moment
from reelquant.kernels import Operands, PackedWeight, Window
from reelquant.nn.spec import LayerLayout


class LayerView(Protocol):
    """The part of :class:`reelquant.nn.layers.QuantLayer` that they use; the attributes are described there."""

    layout: LayerLayout
    weight_shape: tuple[int, ...]
    output_format: torch.memory_format
    clock: tuple[Clock, ...]
    bits_group: int
    keeps: bool
    watch: Any
    kernels: str
    weight: Any
    bias: Tensor | None
    bias_made: bool
    residency: Any
    output_table: Any  # where ``layout.table`` is not zero
    _parameters: Mapping[str, Any]
    _buffers: Mapping[str, Any]

    @property
    def operands(self) -> Operands:
        """The layer as kernels see it."""
        ...

    @property
    def packed(self) -> PackedWeight:
        """The weight with its quantizer, dense."""
        ...

    @property
    def window(self) -> Window | None:
        """How a convolution slides."""
        ...

    def branch_tensors(self, branch: Branch) -> dict[str, Tensor]:
        """The tensors of one branch, by name."""
        ...

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of the output for this input."""
        ...

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the input, given that of the output."""
        ...

    def prepare(self) -> Any:
        """Choose a kernel and let it repack the weight."""
        ...

    def compute(self, input: Tensor, moment: Moment, activation: str = "") -> Tensor:
        """The output at a given moment."""
        ...
