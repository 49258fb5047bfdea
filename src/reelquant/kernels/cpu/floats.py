"""Products whose inputs stay float: weights are widened a cache-sized piece at a time, or read directly where there are few rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant.formats import Int
from reelquant.kernels.cpu import levels, loops
from reelquant.kernels.operands import Operands, check_width

FEW = 8  # rows up to which codes are multiplied as they are: a product of few rows waits for memory
PIECE = 8 << 20  # bytes of widened weights at a time
KEPT = 1 << 15  # weights of layers whose floats are kept: widening them in every call would take as long as their product


def refuses(operands: Operands) -> str | None:
    """Why a layer cannot take this path, or None."""
    weight = operands.weight.quantizer
    if not isinstance(weight.format, Int) or not weight.format.signed or weight.format.bits not in LAYOUTS:
        return f"weights are {weight.format.name}, not int8 or int4"
    kinds, even = LAYOUTS[weight.format.bits]
    if weight.granularity.kind not in kinds or (even and (weight.granularity.size or operands.weight.width) % 2):
        return f"weights have a scale per {weight.granularity}"
    return None


LAYOUTS = {8: (("tensor", "channel"), False), 4: (("tensor", "channel", "group"), True)}  # bits -> granularities, groups of whole bytes


class FloatProduct:
    """``product(quantized_input(x), weight) + bias`` in the dtype of ``x``; in float32 where the input is rounded or rewritten first.

    Results differ from the reference by the rounding of weights to the dtype of ``x``, as in a model of that dtype.
    """

    def __init__(self, operands: Operands) -> None:
        self.given = operands
        weight = operands.weight
        self.scale = weight.quantizer.scale.float().reshape(-1)
        if weight.quantizer.granularity.kind == "tensor":
            self.scale = self.scale.expand(weight.shape[0]).contiguous()
        groups = loops.view(self.scale)
        self.weights = loops.view(weight.codes), groups if weight.codes.dtype == torch.int8 else groups.reshape(weight.shape[0], -1)
        self.size = weight.quantizer.granularity.size or weight.width
        self.exact = operands.input is not None or operands.rewritten
        self.quantized_input = operands.quantized_input if levels.refuses(operands) else levels.LevelInputs(operands)
        self.bias = None if operands.bias is None else operands.bias.detach().float()
        self.kept: dict[torch.dtype, Tensor] = {}

    def __call__(self, x: Tensor, slot: int | Tensor = 0) -> Tensor:
        given = self.given
        check_width(x, given.weight.shape, given.window)
        quantized = self.quantized_input(given.padded(x), slot) if self.exact else given.padded(x)
        if quantized.dtype not in (torch.float32, torch.bfloat16):
            quantized = quantized.float()
        linear = given.window is None
        few = linear and given.weight.codes.dtype == torch.int8 and 0 < quantized.numel() <= FEW * quantized.shape[-1]
        few = few and not quantized.requires_grad  # loops know nothing of gradients
        made = self._few(quantized) if few else self._many(quantized) if linear else self._convolved(quantized)
        return made if made.dtype == x.dtype else made.to(x.dtype)

    def _few(self, x: Tensor) -> Tensor:
        codes, scale = self.weights
        out = torch.empty(x.numel() // x.shape[-1], len(codes), dtype=torch.float32)
        bias = loops.NONE if self.bias is None else self.bias.numpy()
        rows = x.reshape(-1, x.shape[-1]).float().contiguous()
        loops.spread(loops.dot_rows, len(codes), codes.size, codes, scale, rows.numpy(), bias, out.numpy())
        return out.view(*x.shape[:-1], len(codes))

    def _many(self, x: Tensor) -> Tensor:
        """A product of matrices: with more axes and a memory of gaps, ``F.linear`` would copy the weight once per clip."""
        return (
            self._product(x) if x.ndim == 2 else self._product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.given.weight.shape[0])
        )

    def _product(self, x: Tensor) -> Tensor:
        rows = self.given.weight.shape[0]
        step = max(PIECE // (self.given.weight.width * x.element_size()), 64)
        bias = self.bias if self.bias is None or self.bias.dtype == x.dtype else self.bias.to(x.dtype)
        if rows <= step:
            return F.linear(x, self._whole(x.dtype), bias)
        out = x.new_empty(len(x), rows)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            out[:, start:stop] = F.linear(x, self._widened(start, stop, x.dtype), None if bias is None else bias[start:stop])
        return out

    def _convolved(self, x: Tensor) -> Tensor:
        weight = self._whole(x.dtype).view(self.given.weight.shape)
        return self.given.product(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def _whole(self, dtype: torch.dtype) -> Tensor:
        """All of the weight as floats; those of a small layer are kept."""
        if (kept := self.kept.get(dtype)) is not None:
            return kept
        rows, width = self.given.weight.shape[0], self.given.weight.width
        made = self._widened(0, rows, dtype)
        if rows * width <= KEPT:
            self.kept[dtype] = made
        return made

    def _widened(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows of the weight as floats, ``[stop - start, width]``."""
        codes, scale = (one[start:stop] for one in self.weights)
        out = torch.empty(stop - start, self.given.weight.width, dtype=dtype)
        if self.given.weight.codes.dtype == torch.int8:
            loops.spread(loops.widen_rows, len(codes), codes.size, codes, scale, loops.view(out))
        else:
            loops.spread(loops.widen_nibbles, len(codes), 2 * codes.size, codes, scale, self.size, 8, loops.view(out))
        return out
