"""Layers: quantized replacements of linear and convolution layers, and how they enter a model."""

from reelquant.nn.layers import (
    LAYERS,
    LayerTensors,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantLayer,
    QuantLinear,
    buffer_shapes,
    prepares_input,
    quantized_class,
)
from reelquant.nn.runtime import set_kernels, start_runtime, stop_runtime
from reelquant.nn.spec import LayerLayout, TensorLayout
from reelquant.nn.swap import (
    KernelFacts,
    count_tensors,
    count_weights,
    dequantized,
    get_module,
    kernels_of,
    layer_facts,
    quantized_layers,
    set_module,
    start_clock,
    stop_clock,
)

__all__ = [
    "LAYERS",
    "KernelFacts",
    "LayerLayout",
    "LayerTensors",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantLayer",
    "QuantLinear",
    "TensorLayout",
    "buffer_shapes",
    "count_tensors",
    "count_weights",
    "dequantized",
    "get_module",
    "kernels_of",
    "layer_facts",
    "prepares_input",
    "quantized_class",
    "quantized_layers",
    "set_kernels",
    "set_module",
    "start_clock",
    "start_runtime",
    "stop_clock",
    "stop_runtime",
]
