"""Layers: quantized replacements of linear and convolution layers, and how they enter a model. How products are computed does not belong
here."""

from reelquant.nn.around.attention import (
    around_attention,
    ask_attention,
    asked_attention,
    attention_facts,
    put_around_attention,
    remove_around_attention,
    round_attention,
    stock_attention,
    stop_attention,
)
from reelquant.nn.around.attention_around import AroundAttention, AttentionCall
from reelquant.nn.around.attention_choice import best, compare_attention
from reelquant.nn.around.attention_facts import AttentionFacts, expected_attention
from reelquant.nn.around.attention_logits import ScaledLogits, count_tokens, scale_logits, scaled_logits
from reelquant.nn.around.attention_plan import AttentionPlan, placed
from reelquant.nn.extended import prepares_input, quantized_class
from reelquant.nn.finite import broken, check_finite, check_tensors, is_finite
from reelquant.nn.layer_classes import LAYERS, QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear
from reelquant.nn.layers import QuantLayer
from reelquant.nn.narrow import is_narrow, widened, widened_layer
from reelquant.nn.runtime import set_attention, set_kernels, start_runtime, stop_runtime
from reelquant.nn.saturation import Clipped, Saturation
from reelquant.nn.spec import SHIFT_DTYPE, LayerLayout, LayerTensors, TensorLayout, buffer_shapes, mix_name
from reelquant.nn.swap import (
    KernelFacts,
    change_bits,
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
from reelquant.nn.transplant import take_over_codes

__all__ = [
    "LAYERS",
    "SHIFT_DTYPE",
    "AroundAttention",
    "AttentionCall",
    "AttentionFacts",
    "AttentionPlan",
    "Clipped",
    "KernelFacts",
    "LayerLayout",
    "LayerTensors",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantLayer",
    "QuantLinear",
    "Saturation",
    "ScaledLogits",
    "TensorLayout",
    "around_attention",
    "ask_attention",
    "asked_attention",
    "attention_facts",
    "best",
    "broken",
    "buffer_shapes",
    "change_bits",
    "check_finite",
    "check_tensors",
    "compare_attention",
    "count_tensors",
    "count_tokens",
    "count_weights",
    "dequantized",
    "expected_attention",
    "get_module",
    "is_finite",
    "is_narrow",
    "kernels_of",
    "layer_facts",
    "mix_name",
    "placed",
    "prepares_input",
    "put_around_attention",
    "quantized_class",
    "quantized_layers",
    "remove_around_attention",
    "round_attention",
    "scale_logits",
    "scaled_logits",
    "set_attention",
    "set_kernels",
    "set_module",
    "start_clock",
    "start_runtime",
    "stock_attention",
    "stop_attention",
    "stop_clock",
    "stop_runtime",
    "widened",
    "widened_layer",
]

take_over_codes()
