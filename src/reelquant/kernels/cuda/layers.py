"""Quantized layers on NVIDIA GPUs: which of the Triton kernels computes one, with what was repacked once; torch's own product without them.

A static input is rounded with the scale of the current step; the step is read by the kernel from the device in compiled graphs, and is a
row of the table in eager mode, so no layer waits for the GPU. Rotated inputs are rotated by torch before they are rounded.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant.formats import Granularity, Int, Quantizer, pack
from reelquant.kernels import cuda, torch_ops
from reelquant.kernels.cuda import refusals
from reelquant.kernels.hadamard import hadamard
from reelquant.kernels.input_code_cache import forget, recall, remember
from reelquant.kernels.kernel import Kernel
from reelquant.kernels.operands import Operands, PackedWeight, Runner

EPILOGUE_NAMES = {"": "none", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "silu": "silu"}
WRITTEN = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn


# --- codes --------------------------------------------------------------------------------------------------------------------------


def whole_codes(weight: PackedWeight) -> Tensor:
    """Codes ``[out, width]``: e4m3 and int8 in the memory they are stored in, integers of fewer bits widened to int8."""
    if weight.quantizer.format.name == "e4m3":
        return weight.codes.view(FP8)
    return weight.codes if weight.codes.dtype == torch.int8 else weight.unpacked().to(torch.int8) + int(weight.quantizer.format.low)


def folded(weight: PackedWeight) -> PackedWeight:
    """int8 codes with one scale per row, its largest weight at 127: a weight moves by half of a 127th of that at most."""
    values = weight.dequantize().flatten(1)
    scale = values.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    codes = (values / scale[:, None]).round().to(torch.int8)
    return PackedWeight(codes, Quantizer(Int(8), Granularity("channel"), scale), weight.shape)


class _Inputs:
    """Codes of an input with the numbers of a step; made once for layers that read one tensor with the same numbers."""

    def __init__(self, operands: Operands) -> None:
        numbers = operands.input
        assert numbers is not None
        self.rotate = operands.rotate
        self.axis = operands.channel_axis
        self.pre = {"pre_shift": operands.shift, "pre_scale": operands.scale}
        self.scale, self.zero_point = numbers.scale, numbers.zero_point
        self.dynamic = numbers.rule is not None
        self.dtype = torch.int8 if isinstance(numbers.format, Int) else FP8
        self.levels = {}
        if isinstance(numbers.format, Int) and numbers.format.bits < 8:
            lowest = numbers.format.low if numbers.format.signed else -128.0  # affine codes are stored less 128
            self.levels = {"lowest": lowest, "highest": lowest + 2**numbers.format.bits - 1}
        tensors = (self.scale, self.zero_point, operands.shift, operands.scale)
        told = (self.rotate, self.dynamic, self.dtype, self.levels, [None if one is None else one.flatten().tolist() for one in tensors])
        self.key = hashlib.sha256(repr(told).encode()).digest()

    def table(self, slot: int | Tensor) -> dict[str, Tensor | None]:
        """Scale and zero point for kernels: the row of a step that is known, or the table and where to look."""
        assert self.scale is not None
        if isinstance(slot, Tensor) and len(self.scale) > 1:
            return {"input_scale": self.scale, "zero_point": self.zero_point, "slot": slot}
        row = slice(0, 1) if len(self.scale) == 1 else slice(int(slot), int(slot) + 1)
        return {"input_scale": self.scale[row], "zero_point": None if self.zero_point is None else self.zero_point[row], "slot": None}

    def codes(self, x: Tensor, slot: int | Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Codes of ``[..., channels]``, and the scales that belong to them."""
        many = self.scale is not None and len(self.scale) > 1
        if self.axis != -1 or (many and isinstance(slot, Tensor)):  # nothing waits for the device to say which step it is
            return self._made(x, slot)
        key = self.key, slot if many else 0
        if (kept := recall(x, key)) is None:
            forget()
            kept = self._made(x, slot)
            remember(x, key, kept)
        return kept

    def _made(self, x: Tensor, slot: int | Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
        x = hadamard(x.float()) if self.rotate else x
        if self.dynamic:
            found = cuda.quantize_per_token if self.axis == -1 else cuda.quantize_per_sample
            codes, scales = found(x, **self.pre, dtype=self.dtype, **self.levels)
            return codes, {"input_scale": scales, "input_zero_point": None, "slot": None}
        table = self.table(slot)
        codes = cuda.quantize_static(x, **table, **self.pre, dtype=self.dtype, **self.levels)
        return codes, {"input_scale": table["input_scale"], "input_zero_point": table["zero_point"], "slot": table["slot"]}


def _dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in WRITTEN else torch.float32


# --- runners ------------------------------------------------------------------------------------------------------------------------


class CodeLinear:
    """8-bit codes times 8-bit codes, int8 or e4m3, everything after the product in the same kernel."""

    fused = tuple(EPILOGUE_NAMES)

    def __init__(self, operands: Operands) -> None:
        self.inputs = _Inputs(operands)
        self.weight = whole_codes(operands.weight)
        self.scale = operands.weight.quantizer.scale
        self.bias = operands.bias
        self.sums = None if self.inputs.zero_point is None else cuda.weight_sums(self.weight)

    def rounding(self, operands: Operands) -> CodeLinear:
        """The same weight, in the same memory, with another rounding of its inputs."""
        twin = copy.copy(self)
        twin.inputs = _Inputs(operands)
        return twin

    def __call__(self, x: Tensor, slot: int | Tensor = 0, activation: str = "") -> Tensor:
        codes, numbers = self.inputs.codes(x, slot)
        return cuda.linear_8bit(
            codes, self.weight, weight_scale=self.scale, bias=self.bias, activation=EPILOGUE_NAMES[activation], weight_sums=self.sums,
            out_dtype=_dtype(x), **numbers,
        ).to(x.dtype)  # fmt: skip


class PlainLinear:
    """8-bit codes times 8-bit codes by ``torch._int_mm``; everything around the product is plain torch."""

    fused = tuple(EPILOGUE_NAMES)

    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.weight = whole_codes(operands.weight)
        self.sums = self.weight.sum(1, dtype=torch.int32)

    def __call__(self, x: Tensor, slot: int | Tensor = 0, activation: str = "") -> Tensor:
        numbers = self.operands.input
        assert numbers is not None and isinstance(numbers.format, Int)
        moved = self.operands.rewritten_input(x)
        quantizer = numbers.quantizer(moved, slot)
        zero = quantizer.scale.new_full((), -numbers.format.low) if quantizer.zero_point is None else quantizer.zero_point
        out = torch_ops.linear_8bit(
            quantizer.codes(moved), self.weight, quantizer.scale.reshape(-1), self.operands.weight.quantizer.scale, None,
            self.operands.bias, EPILOGUE_NAMES[activation], zero.reshape(1, 1), self.sums, _dtype(x),
        )  # fmt: skip
        return torch.where(moved.isnan().any(), torch.nan, out).to(x.dtype)  # no code stands for NaN, and it must show


class PlainFloat8Linear:
    """e4m3 codes times e4m3 codes by ``torch._scaled_mm``; NaN has a code, and shows in the rows that read it."""

    fused = tuple(EPILOGUE_NAMES)

    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.weight = whole_codes(operands.weight)

    def __call__(self, x: Tensor, slot: int | Tensor = 0, activation: str = "") -> Tensor:
        numbers = self.operands.input
        assert numbers is not None
        moved = self.operands.rewritten_input(x)
        scale = numbers.quantizer(moved, slot).scale
        unit = moved / (scale.reshape(*moved.shape[:-1], 1) if self.dynamic else scale)
        return torch_ops.linear_8bit(
            unit.clamp(numbers.format.low, numbers.format.high).to(FP8), self.weight, scale.reshape(-1),
            self.operands.weight.quantizer.scale, None, self.operands.bias, EPILOGUE_NAMES[activation], out_dtype=_dtype(x),
        ).to(x.dtype)  # fmt: skip

    @property
    def dynamic(self) -> bool:
        """Whether every token has a scale of its own."""
        return self.operands.input is not None and self.operands.input.rule is not None


class NibbleLinear:
    """8-bit codes times 4-bit codes in groups; the weight is repacked in the same number of bytes and is given back as it was."""

    fused = tuple(EPILOGUE_NAMES)

    def __init__(self, operands: Operands) -> None:
        self.inputs = _Inputs(operands)
        rows, width = operands.weight.shape
        self.size, self.width = operands.weight.quantizer.granularity.size, width
        self.weight, self.scale, sums = cuda.repack_4bit(operands.weight.codes, operands.weight.quantizer.scale, width, self.size)
        self.sums = None if self.inputs.zero_point is None else sums
        self.bias = operands.bias
        self.rows = rows

    def rounding(self, operands: Operands) -> NibbleLinear:
        """The same weight, in the same memory, with another rounding of its inputs."""
        twin = copy.copy(self)
        twin.inputs = _Inputs(operands)
        return twin

    def codes(self) -> Tensor:
        """The weight as a checkpoint stores it."""
        return stored_nibbles(self.weight, self.rows, self.width, self.size)

    def __call__(self, x: Tensor, slot: int | Tensor = 0, activation: str = "") -> Tensor:
        codes, numbers = self.inputs.codes(x, slot)
        return cuda.linear_w4a8(
            codes, self.weight, self.scale, bias=self.bias, activation=EPILOGUE_NAMES[activation], group=self.size, weight_sums=self.sums,
            out_dtype=_dtype(x), **numbers,
        ).to(x.dtype)  # fmt: skip


class FloatLinear:
    """Float inputs times 8-bit or 4-bit codes, which become floats inside of the kernel."""

    fused = tuple(EPILOGUE_NAMES)

    def __init__(self, operands: Operands) -> None:
        self.bias = operands.bias
        self.rows, self.width = operands.weight.shape
        quantizer = operands.weight.quantizer
        self.bits, self.size = quantizer.format.bits, quantizer.granularity.size
        if self.bits == 8:
            self.weight, self.scale = whole_codes(operands.weight), quantizer.scale
            self.codes = None
        else:
            self.weight, self.scale, _ = cuda.repack_4bit(operands.weight.codes, quantizer.scale, self.width, self.size)
            self.codes = lambda: stored_nibbles(self.weight, self.rows, self.width, self.size)

    def __call__(self, x: Tensor, slot: int | Tensor = 0, activation: str = "") -> Tensor:
        given = x if x.dtype in (torch.bfloat16, torch.float16) else x.to(torch.bfloat16)
        common = {"bias": self.bias, "activation": EPILOGUE_NAMES[activation]}
        if self.bits == 8:
            return cuda.linear_w8a16(given, self.weight, self.scale, **common).to(x.dtype)
        return cuda.linear_w4a16(given, self.weight, self.scale, group=self.size, **common).to(x.dtype)


class Widened:
    """Float inputs times a weight that is made float in every call, in the dtype of the input; rewritten inputs in float32."""

    def __init__(self, operands: Operands) -> None:
        self.operands = operands

    def __call__(self, x: Tensor, slot: int | Tensor = 0) -> Tensor:
        given = self.operands
        x_in = given.rewritten_input(given.padded(x)) if given.rewritten else given.padded(x)
        bias = None if given.bias is None else given.bias.to(x_in.dtype)
        return given.product(x_in, given.weight.dequantize(x_in.dtype), bias).to(x.dtype)


class CodeConvolution:
    """A convolution of 8-bit codes, int8 or e4m3, channels last.

    Attributes:
        inside: whether the kernel makes the border itself: it is the same on both sides, and one code stands for zero in all samples.
    """

    def __init__(self, operands: Operands) -> None:
        assert operands.window is not None
        self.window, self.shape = operands.window, operands.weight.shape
        codes = whole_codes(operands.weight).reshape(self.shape)
        self.weight = cuda.repack_convolution(codes)
        self.scale = operands.weight.quantizer.scale
        self.bias = operands.bias
        self._read(operands)
        self.sums = None if self.inputs.zero_point is None else cuda.weight_sums(codes)
        self.stored = operands.weight.codes.dtype
        self.codes = self._codes if operands.weight.quantizer.format.bits == 8 else None  # widened ones lie beside the stored ones
        sides = list(zip(self.window.padding[-2::-2], self.window.padding[::-2], strict=True)) or [(0, 0)] * len(self.window.stride)
        even = all(before == after for before, after in sides)
        self.inside = even and not (self.inputs.dynamic and operands.shift is not None)
        self.padding = [before if self.inside else 0 for before, _ in sides]

    def _read(self, operands: Operands) -> None:
        self.inputs, self.zeros = _Inputs(operands), None
        if self.inputs.scale is not None and (self.inputs.zero_point is not None or operands.shift is not None):
            self.zeros = cuda.padding_codes(
                self.inputs.scale, self.shape[1], operands.shift, operands.scale, self.inputs.zero_point, self.inputs.dtype,
                **self.inputs.levels,
            )  # fmt: skip

    def rounding(self, operands: Operands) -> CodeConvolution:
        """The same weight, in the same memory, with another rounding of its inputs."""
        twin = copy.copy(self)
        twin._read(operands)
        return twin

    def _codes(self) -> Tensor:
        """The weight as a checkpoint stores it."""
        return self.weight.permute(0, 4, 1, 2, 3).reshape(self.shape[0], -1).view(self.stored)

    def __call__(self, x: Tensor, slot: int | Tensor = 0) -> Tensor:
        x = x if self.inside else F.pad(x, self.window.padding)
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


def prepare_folded(operands: Operands) -> Runner:
    """8-bit codes times groups whose scales are folded into 8-bit codes; the packed weight stays beside them."""
    given = replace(operands, weight=folded(operands.weight))
    if given.window is None:
        return CodeLinear(given)
    runner = CodeConvolution(given)
    runner.codes = None  # what is stored cannot come back from folded codes
    return runner


def stored_nibbles(weight: Tensor, rows: int, width: int, size: int) -> Tensor:
    """Undo :func:`reelquant.kernels.cuda.gemm_grouped.repack_4bit`: ``[rows, bytes]`` uint8."""
    bytes_ = weight.view(torch.uint8).reshape(rows, -1, size // 2)
    signed = torch.cat([bytes_ & 15, bytes_ >> 4], -1).reshape(rows, -1)[:, :width]
    return pack((signed ^ 8).contiguous(), 4)


LINEAR = frozenset({"input", "shift", "scale", "rotate"})
CONVOLUTION = LINEAR | {"window"}
KERNELS = (
    Kernel("triton int8", LINEAR, refusals.refuses_linear, CodeLinear),
    Kernel("triton int8 from int4", LINEAR, refusals.refuses_nibbles, NibbleLinear),
    Kernel("triton int8 convolution", CONVOLUTION, refusals.refuses_convolution, CodeConvolution),
    Kernel("triton e4m3", LINEAR, refusals.refuses_float8, CodeLinear),
    Kernel("triton e4m3 convolution", CONVOLUTION, refusals.refuses_float8_convolution, CodeConvolution),
    Kernel("triton int8 from groups", CONVOLUTION, refusals.refuses_folded, prepare_folded),
    Kernel("triton float products", frozenset(), refusals.refuses_float, FloatLinear),
    Kernel("torch int8", LINEAR, refusals.refuses_plain, PlainLinear),
    Kernel("torch e4m3", LINEAR, refusals.refuses_plain_float8, PlainFloat8Linear),
    Kernel("torch float products", frozenset({"shift", "scale", "rotate", "window"}), refusals.refuses_nothing, Widened),
)
"""Best first."""
