"""Triton's interpreter, made to round as the hardware does.

As of triton 3.7 the interpreter truncates float32 to bfloat16, loses the carry when it rounds to float8, takes integers for the bits of
a bfloat16, and multiplies the bit patterns of bfloat16 tiles. The tests replace these functions by torch's conversions and by products
in float32 (exact for 8-bit codes: a tile's sums stay below 2^24).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

TORCH = {
    "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2, "bf16": torch.bfloat16, "fp16": torch.float16,
    "fp32": torch.float32, "fp64": torch.float64,
}  # fmt: skip
BITS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def convert(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
    """Bit patterns of ``data`` in another float type; to nearest, ties to even."""
    del mode
    bits = torch.frombuffer(bytearray(np.ascontiguousarray(data).tobytes()), dtype=TORCH[source.name])
    new = bits.to(TORCH[target.name]).contiguous().view(torch.uint8).numpy()
    return new.view(BITS[target.primitive_bitwidth]).reshape(data.shape)


def _as_float32(tile: Any) -> np.ndarray:
    if tile.dtype.is_floating() and tile.data.dtype.kind == "u":
        return convert(tile.data, tile.dtype, tl.float32, None).view(np.float32)
    return tile.data.astype(np.float32)


def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """Product of two tiles with float32 sums, added to ``d`` in its own type."""
    del self, input_precision, max_num_imprecise_acc
    product = _as_float32(a) @ _as_float32(b)
    return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


def signed_to_float(self: Any, source: Any, target: Any) -> Any:
    """Integers to floats; to bfloat16 through float32."""
    scalar = target.scalar if hasattr(target, "scalar") else target
    data = source.data.astype(np.float32)
    if scalar == tl.bfloat16:
        return interpreter.TensorHandle(convert(data, tl.float32, tl.bfloat16, None), tl.bfloat16)
    return self.cast_impl(source, target)


def install() -> None:
    """Replace them for this process."""
    interpreter.InterpreterBuilder.create_si_to_fp = signed_to_float
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
