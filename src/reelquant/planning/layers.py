"""Layers to time: true shapes, numbers that do not matter."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from reelquant.nn import LayerLayout, QuantLayer, TensorLayout, quantized_class
from reelquant.stages import Specs

ONE = {torch.uint8: 56, torch.int8: 1}  # scales that are stored as bytes: 1.0 in e4m3, and a finite number in e8m0


def layout_of(specs: Specs) -> LayerLayout:
    """How a layer with these numbers is stored, without what data decides (shifts, rotations): formats with tables of levels that the
    range rule may choose are taken as the first that has none."""
    weight, inputs = (None if one is None else _tensor(one) for one in (specs.weight, specs.input))
    assert weight is not None
    return LayerLayout(weight, inputs)


def _tensor(spec: Any) -> TensorLayout:
    plain = next((one for one in (spec.format, *spec.alternatives) if one.table is None), spec.format)
    return TensorLayout.of(spec, plain)


@torch.no_grad()
def quantized_layer(stock: nn.Module, specs: Specs, dtype: torch.dtype, device: str) -> QuantLayer:
    """A quantized layer of random codes.

    Args:
        stock: the float layer; its parameters may be on the meta device.
        specs: its numbers.
        dtype: of the bias, and of the inputs that it will get.
        device: where it computes.
    """
    empty = copy.copy(stock)
    empty._parameters = {key: None if value is None else nn.Parameter(value.to("meta", dtype)) for key, value in stock._parameters.items()}
    made = quantized_class(stock).like(empty, layout_of(specs), device=device)  # pyright: ignore
    made.weight.data = torch.randint(0, 255, made.weight.shape, dtype=torch.uint8, device=device).view(made.weight.dtype)
    for buffer in made.buffers(recurse=False):
        buffer.fill_(ONE.get(buffer.dtype, 0.01))
    if made.bias is not None:
        made.bias.data = torch.zeros(len(made.bias), dtype=dtype, device=device)
    return made.eval()


@torch.no_grad()
def float_layer(stock: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """A float layer of random numbers."""
    made = copy.copy(stock)
    made._parameters = {
        key: None if value is None else nn.Parameter(torch.randn(value.shape, device=device).to(dtype) * 0.02, requires_grad=False)
        for key, value in stock._parameters.items()
    }
    return made.eval()
