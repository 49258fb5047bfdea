"""Quantized layers of random numbers, for tests that compare whatever computes them with the reference."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.formats import fit, pack, parse_format
from reelquant.formats.scales import scale_tensors
from reelquant.kernels import backend
from reelquant.nn import LayerLayout, LayerTensors, QuantLayer, TensorLayout, quantized_class

WEIGHTS = [("int8", "channel"), ("int8", "tensor"), ("int6", "channel"), ("int4", "channel"), ("int4", "group-64"), ("int4", "group-8")]
INPUTS: dict[str, TensorLayout | None] = {
    "int8": TensorLayout("int8", "tensor"),
    "uint8": TensorLayout("uint8", "tensor"),
    "int6": TensorLayout("int6", "tensor"),
    "int8 token": TensorLayout("int8", "token", dynamic=True),
    "int8 sample": TensorLayout("int8", "sample", dynamic=True),
    "float": None,
}
REACH = {"uint8": 128, "int6": 32, "uint6": 32, "e4m3": 448}  # codes between zero and the end of a range
REWRITES: dict[str, dict[str, Any]] = {
    "": {},
    "shift and scale": {"shift": True, "scale": True},
    "rotate": {"rotate": True, "scale": True},
    "mix": {"mix": ("scale", "rotate", "permute"), "rotate": True, "shift": True},
}
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(96, 70), (3, 11, 96)),
    "Linear without bias": (lambda: nn.Linear(40, 5, bias=False), (13, 40)),
    "Linear of one column": (lambda: nn.Linear(1, 3), (9, 1)),
    "Conv1d": (lambda: nn.Conv1d(6, 5, 3, padding=1), (2, 6, 9)),
    "Conv2d": (lambda: nn.Conv2d(12, 20, 3, padding=1), (2, 12, 7, 9)),
    "Conv2d strided": (lambda: nn.Conv2d(12, 20, 3, stride=2, padding=(1, 2), dilation=(2, 1)), (2, 12, 9, 9)),
    "Conv2d same": (lambda: nn.Conv2d(6, 5, (2, 3), padding="same", bias=False), (2, 6, 5, 5)),
    "Conv2d of one channel": (lambda: nn.Conv2d(1, 1, 1), (1, 1, 4, 4)),
    "Conv3d": (lambda: nn.Conv3d(8, 6, (3, 1, 1), padding=(1, 0, 0)), (2, 8, 5, 4, 6)),
}


def make(name: str, weight: tuple[str, ...], numbers: TensorLayout | None, slots: int = 1, **rewrite: Any) -> tuple[QuantLayer, Tensor]:
    """A layer of random numbers, and an input whose values reach the ends of its range.

    Args:
        weight: format, granularity and, if it is not ``float``, which numbers the scales are.
    """
    torch.manual_seed(0)
    module, shape = LAYERS[name][0](), LAYERS[name][1]
    kind: Any = quantized_class(module)
    stored_weight = TensorLayout(*weight[:2], scale=weight[2] if len(weight) > 2 else "float")
    layout = LayerLayout(stored_weight, numbers, slots=slots, bias=module.bias is not None, **rewrite)
    layer: QuantLayer = kind.like(module, layout)
    quantizer = fit(layout.weight.spec(), module.weight.data)
    codes = quantizer.codes(module.weight.data).flatten(1)
    stored = (codes ^ 128).view(torch.int8) if weight[0] == "int8" else pack(codes, quantizer.format.bits)
    channels, extra = layer._channels(), {}
    if numbers is not None and not numbers.dynamic:
        extra["input_scale"] = torch.linspace(3.7, 2.1, slots)[:, None] / REACH.get(numbers.format, 128)
        if numbers.format.startswith("uint"):
            extra["input_zero_point"] = (torch.linspace(117, 131, slots) * REACH[numbers.format] / 128).round()[:, None]
    if layout.shift:
        extra["pre_quant_shift"] = torch.randn(channels).bfloat16() / 2
    if layout.scale:
        extra["pre_quant_scale"] = (torch.rand(channels) + 0.5).bfloat16()
    if layout.mix:
        extra |= {"pre_quant_mix_0": (torch.rand(channels) + 0.5).bfloat16(), "pre_quant_mix_2": torch.randperm(channels).int()}
    bias = None if module.bias is None else module.bias.data
    scale, beside = scale_tensors(stored_weight.scale, quantizer.scale, quantizer.whole, layer.weight_scale.dtype)
    extra |= {f"weight_scale{name}": tensor for name, tensor in beside.items()}
    layer.fill(LayerTensors(stored, scale, bias, extra))
    return layer, torch.randn(shape)


def oracle(layer: QuantLayer, x: Tensor) -> Tensor:
    """What the reference gives; the layer itself is left as it is."""
    with backend("reference"), torch.no_grad():
        return copy.deepcopy(layer)(x)


def one_code(layer: QuantLayer) -> float:
    """The most that one input code more or less can move an output: a code at a border between two may go either way."""
    scale, numbers = getattr(layer, "input_scale", None), layer.layout.input
    assert numbers is None or scale is not None or numbers.dynamic
    step = 4 / (parse_format(numbers.format).high if numbers else 127) if scale is None else float(scale.max())
    return step * float(layer.packed.dequantize().abs().max())
