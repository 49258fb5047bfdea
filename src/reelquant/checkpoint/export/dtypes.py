"""What the two formats that are safetensors files share: forms are dtypes, and 8-bit codes have a dtype of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.checkpoint.export.assemble import Dialect
from reelquant.checkpoint.export.source import ExportSource, Facts
from reelquant.checkpoint.export.write import Shape
from reelquant.formats import Int, NumberFormat


class SafetensorsDialect(Dialect[torch.dtype]):
    """Floats keep the dtype that they have in the artifact."""

    def float_form(self, source: ExportSource, name: str, shape: Shape, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def dequantized_form(self, source: ExportSource, facts: Facts) -> torch.dtype:
        return torch.float32 if facts.fp32 else source.dtype

    def cast(self, value: Tensor, form: torch.dtype) -> Tensor:
        return value.to(form)

    def size(self, shape: Shape, form: torch.dtype) -> int:
        return torch.Size(shape).numel() * form.itemsize

    def called(self, form: torch.dtype) -> str:
        return str(form).removeprefix("torch.")


def code_dtype(numbers: NumberFormat) -> torch.dtype:
    """``int8``, or ``float8_e4m3fn``."""
    return torch.int8 if isinstance(numbers, Int) else torch.float8_e4m3fn


def as_numbers(codes: Tensor, numbers: NumberFormat) -> Tensor:
    """Indices into an 8-bit format as numbers of torch: an index into e4m3 is its bit pattern."""
    return (codes ^ 128).view(torch.int8) if isinstance(numbers, Int) else codes.view(torch.float8_e4m3fn)
