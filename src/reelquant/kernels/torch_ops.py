"""8-bit linear layers out of torch's own products, for machines where Triton is missing or refuses.

``torch._int_mm`` and ``torch._scaled_mm`` run on the tensor cores but want certain multiples of rows and channels on CUDA; operands are
padded with zeros to them. What follows the product is plain torch: several passes over memory in eager mode, one under ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant._errors import UnsupportedError, nearest

FP8 = torch.float8_e4m3fn
MULTIPLE = 16  # of channels on both sides: 16-byte rows, which both products accept
FEWEST_ROWS = 32  # torch._int_mm wants more than 16

EPILOGUES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def _padded(codes: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros below and to the right; as bytes, because float8 has no padding of its own (its zero is a zero byte)."""
    if tuple(codes.shape) == (rows, columns):
        return codes.contiguous()
    return F.pad(codes.view(torch.uint8), (0, columns - codes.shape[1], 0, rows - codes.shape[0])).view(codes.dtype)


def _up(size: int) -> int:
    return max(-(-size // MULTIPLE), 1) * MULTIPLE


def product(codes: Tensor, weight: Tensor) -> Tensor:
    """``codes @ weight^T`` of int8 (exact, int32) or e4m3 (float32) codes: ``[rows, depth]`` times ``[columns, depth]``."""
    (rows, depth), columns = codes.shape, weight.shape[0]
    left = _padded(codes, max(_up(rows), FEWEST_ROWS), _up(depth))
    right = _padded(weight, _up(columns), _up(depth)).t()
    if codes.dtype == FP8:
        one = torch.ones((), dtype=torch.float32, device=codes.device)
        return torch._scaled_mm(left, right, one, one, out_dtype=torch.float32)[:rows, :columns]
    return torch._int_mm(left, right)[:rows, :columns]


def linear_8bit(
    codes: Tensor,
    weight: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    slot: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    input_zero_point: Tensor | None = None,
    weight_sums: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """What :func:`reelquant.kernels.cuda.gemm.linear_8bit` computes, without its low-rank term.

    Args:
        codes: ``[..., depth]`` int8 (symmetric, or affine ``q - 128``), uint8 (affine ``q``) or float8_e4m3fn.
        weight: ``[columns, depth]`` int8, or float8_e4m3fn with float8 codes.
        input_scale: float32 table ``[slots, 1]``, of which the row of ``slot`` holds, or ``[rows]``.
        weight_scale: ``[columns]`` or ``[1]``.
        slot: 0-d int64 for the tables.
        bias: ``[columns]`` or None.
        activation: ``none | gelu | gelu_tanh | silu``.
        input_zero_point, weight_sums: ``[slots, 1]`` float32 and ``[columns]`` of affine inputs.
        out_dtype: of the result.

    Returns:
        ``[..., columns]``.

    Raises:
        UnsupportedError: on dtypes or names that are not known.
    """
    if codes.dtype not in (torch.int8, torch.uint8, FP8) or weight.dtype != (FP8 if codes.dtype == FP8 else torch.int8):
        raise UnsupportedError(
            f"codes of {codes.dtype} meet a weight of {weight.dtype}; known: int8 or uint8 with int8, float8_e4m3fn with itself"
        )
    if activation not in EPILOGUES:
        raise UnsupportedError(f"activation '{activation}' is not known here; {nearest(activation, EPILOGUES)}")
    if (codes.dtype == torch.uint8 and input_zero_point is None) or (input_zero_point is not None and weight_sums is None):
        raise UnsupportedError("affine input codes need input_zero_point and weight_sums")
    signed = (codes ^ 128).view(torch.int8) if codes.dtype == torch.uint8 else codes
    value = product(signed.reshape(codes.shape[:-1].numel(), codes.shape[-1]), weight)
    if input_zero_point is not None and weight_sums is not None:
        value = value + ((128 - _of_slot(input_zero_point, slot)) * weight_sums).to(value.dtype)
    value = value.float() * (input_scale[:, None] if input_scale.ndim == 1 else _of_slot(input_scale, slot)) * weight_scale.float()
    value = EPILOGUES[activation](value if bias is None else value + bias.float())
    return value.to(out_dtype).reshape(*codes.shape[:-1], weight.shape[0])


def _of_slot(table: Tensor, slot: Tensor | None) -> Tensor:
    """The row of the current step ``[1]``, without asking the device which one it is."""
    if table.shape[0] == 1:
        return table[0]
    if slot is None:
        raise UnsupportedError(f"a table of {table.shape[0]} rows has no slot that says which one holds; give the clock's slot")
    return table.index_select(0, slot.reshape(1))[0]
