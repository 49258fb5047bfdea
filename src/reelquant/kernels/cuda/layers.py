"""Quantized layers on NVIDIA GPUs: which of the Triton kernels computes one, with what was repacked once; torch's own product without them.

A static input is rounded with the scale of the current step; the step is read by the kernel from the device in compiled graphs, and is a
row of the table in eager mode, so no layer waits for the GPU. Rotated inputs are rotated by torch before they are rounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant.formats import Int
from reelquant.kernels import cuda, torch_ops
from reelquant.kernels.hadamard import hadamard
from reelquant.kernels.operands import Operands

GROUPS = (16, 32, 64, 128)
ACTIVATIONS = {"": "none", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "silu": "silu"}
WRITTEN = (torch.bfloat16, torch.float16, torch.float32)


def _weight(operands: Operands, bits: tuple[int, ...], kinds: tuple[str, ...]) -> str | None:
    weight = operands.weight.quantizer
    if not isinstance(weight.format, Int) or not weight.format.signed or weight.format.bits not in bits:
        return f"weights are {weight.format.name}, not int{' or int'.join(map(str, bits))}"
    if weight.granularity.kind not in kinds:
        return f"weights have a scale per {weight.granularity}"
    return None


def _input(operands: Operands) -> str | None:
    numbers = operands.numbers
    if numbers is None:
        return "the input stays float"
    if not isinstance(numbers.format, Int) or numbers.format.bits != 8:
        return f"inputs are {numbers.format.name}, not 8-bit integers"
    if numbers.rule is not None:
        plain = numbers.granularity.kind == "token" and numbers.format.signed and type(numbers.rule.range).__name__ == "MinMax"
        return None if plain and operands.window is None else "dynamic inputs are int8 with a scale per token, in linear layers"
    return None if numbers.granularity.kind == "tensor" else f"static inputs have one scale, not one per {numbers.granularity.kind}"


def refuses_linear(operands: Operands) -> str | None:
    """Why a layer is not a product of 8-bit codes, or None."""
    return refuses_plain(operands) or cuda.available()


def refuses_plain(operands: Operands) -> str | None:
    """Why torch's own integer product does not compute a layer, or None; it asks for no Triton."""
    if operands.window is not None:
        return "a convolution"
    return _weight(operands, (8,), ("tensor", "channel")) or _input(operands)


def refuses_nibbles(operands: Operands) -> str | None:
    """Why a layer is not a product of 8-bit codes and 4-bit codes in groups, or None."""
    if operands.window is not None:
        return "a convolution"
    reason = _weight(operands, (4,), ("group",)) or _input(operands)
    if reason is None and (operands.weight.quantizer.granularity.size not in GROUPS or operands.numbers is None or operands.numbers.rule):
        reason = f"groups of {', '.join(map(str, GROUPS))} with static inputs"
    return reason or cuda.available()


def refuses_convolution(operands: Operands) -> str | None:
    """Why a layer is not a convolution of 8-bit codes, or None."""
    if operands.window is None or len(operands.window.stride) not in (2, 3):
        return "not a convolution over two or three axes"
    if operands.rotate:
        return "the input of a convolution is rotated"
    return _weight(operands, (8,), ("tensor", "channel")) or _input(operands) or cuda.available()


def refuses_float(operands: Operands) -> str | None:
    """Why a layer is not a product of floats and codes, or None."""
    if operands.window is not None or operands.numbers is not None or operands.rewritten:
        return "not a linear layer with plain float inputs"
    bits = operands.weight.quantizer.format.bits
    reason = _weight(operands, (4, 8), ("tensor", "channel") if bits == 8 else ("group",))
    if reason is None and bits == 4 and operands.weight.quantizer.granularity.size not in GROUPS:
        reason = f"4-bit groups are {', '.join(map(str, GROUPS))}"
    return reason or cuda.available()


class _Inputs:
    """Codes of an input with the numbers of a step."""

    def __init__(self, operands: Operands) -> None:
        numbers = operands.numbers
        assert numbers is not None
        self.rotate = operands.rotate
        self.axis = operands.channel_axis
        self.pre = {"pre_shift": operands.shift, "pre_scale": operands.scale}
        self.scale, self.zero_point = numbers.scale, numbers.zero_point
        self.dynamic = numbers.rule is not None

    def table(self, slot: int | Tensor) -> dict[str, Tensor | None]:
        """Scale and zero point for kernels: the row of a step that is known, or the table and where to look."""
        assert self.scale is not None
        if isinstance(slot, Tensor) and len(self.scale) > 1:
            return {"input_scale": self.scale, "zero_point": self.zero_point, "slot": slot}
        row = slice(0, 1) if len(self.scale) == 1 else slice(int(slot), int(slot) + 1)
        return {"input_scale": self.scale[row], "zero_point": None if self.zero_point is None else self.zero_point[row], "slot": None}

    def codes(self, x: Tensor, slot: int | Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Codes of ``[..., channels]``, and the scales that belong to them."""
        x = hadamard(x.float()) if self.rotate else x
        if self.dynamic:
            codes, scales = cuda.quantize_per_token(x, **self.pre)
            return codes, {"input_scale": scales, "input_zero_point": None, "slot": None}
        table = self.table(slot)
        codes = cuda.quantize_static(x, **table, **self.pre)
        return codes, {"input_scale": table["input_scale"], "input_zero_point": table["zero_point"], "slot": table["slot"]}


def _dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in WRITTEN else torch.float32


class CodeLinear:
    """8-bit codes times 8-bit codes, everything after the product in the same kernel."""

    fused = tuple(ACTIVATIONS)

    def __init__(self, operands: Operands) -> None:
        self.inputs = _Inputs(operands)
        self.weight = operands.weight.codes
        self.scale = operands.weight.quantizer.scale
        self.bias = operands.bias
        self.sums = None if self.inputs.zero_point is None else cuda.weight_sums(self.weight)

    def __call__(self, x: Tensor, slot: int | Tensor = 0, activation: str = "") -> Tensor:
        codes, numbers = self.inputs.codes(x, slot)
        return cuda.linear_8bit(
            codes, self.weight, weight_scale=self.scale, bias=self.bias, activation=ACTIVATIONS[activation], weight_sums=self.sums,
            out_dtype=_dtype(x), **numbers,
        ).to(x.dtype)  # fmt: skip


class PlainLinear:
    """8-bit codes times 8-bit codes by ``torch._int_mm``; everything around the product is plain torch."""

    fused = tuple(ACTIVATIONS)

    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.sums = operands.weight.codes.sum(1, dtype=torch.int32)

    def __call__(self, x: Tensor, slot: int | Tensor = 0, activation: str = "") -> Tensor:
        weight, numbers = self.operands.weight, self.operands.numbers
        assert numbers is not None and isinstance(numbers.format, Int)
        moved = self.operands.moved(x)
        quantizer = numbers.quantizer(moved, slot)
        zero = quantizer.scale.new_full((), -numbers.format.low) if quantizer.zero_point is None else quantizer.zero_point
        out = torch_ops.linear_8bit(
            quantizer.codes(moved), weight.codes, quantizer.scale.reshape(-1), weight.quantizer.scale, None, self.operands.bias,
            ACTIVATIONS[activation], zero.reshape(1, 1), self.sums, _dtype(x),
        )  # fmt: skip
        return torch.where(moved.isnan().any(), torch.nan, out).to(x.dtype)  # no code stands for NaN, and it must show


class NibbleLinear:
    """8-bit codes times 4-bit codes in groups; the weight is repacked in the same number of bytes and is given back as it was."""

    fused = tuple(ACTIVATIONS)

    def __init__(self, operands: Operands) -> None:
        self.inputs = _Inputs(operands)
        rows, width = operands.weight.shape
        self.size, self.width = operands.weight.quantizer.granularity.size, width
        self.weight, self.scale, sums = cuda.repack_4bit(operands.weight.codes, operands.weight.quantizer.scale, width, self.size)
        self.sums = None if self.inputs.zero_point is None else sums
        self.bias = operands.bias
        self.rows = rows

    def codes(self) -> Tensor:
        """The weight as a checkpoint stores it."""
        return stored_nibbles(self.weight, self.rows, self.width, self.size)

    def __call__(self, x: Tensor, slot: int | Tensor = 0, activation: str = "") -> Tensor:
        codes, numbers = self.inputs.codes(x, slot)
        return cuda.linear_w4a8(
            codes, self.weight, self.scale, bias=self.bias, activation=ACTIVATIONS[activation], group=self.size, weight_sums=self.sums,
            out_dtype=_dtype(x), **numbers,
        ).to(x.dtype)  # fmt: skip


class FloatLinear:
    """Float inputs times 8-bit or 4-bit codes, which become floats inside of the kernel."""

    fused = tuple(ACTIVATIONS)

    def __init__(self, operands: Operands) -> None:
        self.bias = operands.bias
        self.rows, self.width = operands.weight.shape
        quantizer = operands.weight.quantizer
        self.bits, self.size = quantizer.format.bits, quantizer.granularity.size
        if self.bits == 8:
            self.weight, self.scale = operands.weight.codes, quantizer.scale
            self.codes = None
        else:
            self.weight, self.scale, _ = cuda.repack_4bit(operands.weight.codes, quantizer.scale, self.width, self.size)
            self.codes = lambda: stored_nibbles(self.weight, self.rows, self.width, self.size)

    def __call__(self, x: Tensor, slot: int | Tensor = 0, activation: str = "") -> Tensor:
        given = x if x.dtype in (torch.bfloat16, torch.float16) else x.to(torch.bfloat16)
        common = {"bias": self.bias, "activation": ACTIVATIONS[activation]}
        if self.bits == 8:
            return cuda.linear_w8a16(given, self.weight, self.scale, **common).to(x.dtype)
        return cuda.linear_w4a16(given, self.weight, self.scale, group=self.size, **common).to(x.dtype)


class CodeConvolution:
    """A convolution of 8-bit codes, channels last."""

    def __init__(self, operands: Operands) -> None:
        assert operands.window is not None and operands.numbers is not None
        self.inputs, self.window, shape = _Inputs(operands), operands.window, operands.weight.shape
        codes = operands.weight.codes.reshape(shape)
        self.shape = shape
        self.weight = cuda.repack_convolution(codes)
        self.scale = operands.weight.quantizer.scale
        self.bias = operands.bias
        zero = operands.numbers.zero_point
        self.sums = None if zero is None else cuda.weight_sums(codes)
        assert operands.numbers.scale is not None
        self.zeros = None
        if zero is not None or operands.shift is not None:
            self.zeros = cuda.padding_codes(operands.numbers.scale, shape[1], operands.shift, operands.scale, zero)
        sides = list(zip(self.window.padding[-2::-2], self.window.padding[::-2], strict=True)) or [(0, 0)] * len(self.window.stride)
        self.even = all(before == after for before, after in sides)
        self.padding = [before if self.even else 0 for before, _ in sides]

    def codes(self) -> Tensor:
        """The weight as a checkpoint stores it."""
        return self.weight.permute(0, 4, 1, 2, 3).reshape(self.shape[0], -1)

    def __call__(self, x: Tensor, slot: int | Tensor = 0) -> Tensor:
        x = x if self.even else F.pad(x, self.window.padding)
        batched = x if x.ndim == len(self.shape) else x[None]
        codes, numbers = self.inputs.codes(batched.movedim(1, -1), slot)
        zeros = self.zeros
        if zeros is not None and numbers["slot"] is None and len(zeros) > 1:
            zeros = zeros[int(slot) : int(slot) + 1]
        out = cuda.convolution_8bit(
            codes.movedim(-1, 1), self.weight, weight_scale=self.scale, stride=self.window.stride, padding=self.padding,
            dilation=self.window.dilation, bias=self.bias, pad_codes=zeros, weight_sums=self.sums, out_dtype=_dtype(x), **numbers,
        )  # fmt: skip
        return (out if batched is x else out[0]).to(x.dtype)


def stored_nibbles(weight: Tensor, rows: int, width: int, size: int) -> Tensor:
    """Undo :func:`reelquant.kernels.cuda.gemm_grouped.repack_4bit`: ``[rows, bytes]`` uint8."""
    from reelquant.formats import pack

    bytes_ = weight.view(torch.uint8).reshape(rows, -1, size // 2)
    signed = torch.cat([bytes_ & 15, bytes_ >> 4], -1).reshape(rows, -1)[:, :width]
    return pack((signed ^ 8).contiguous(), 4)
