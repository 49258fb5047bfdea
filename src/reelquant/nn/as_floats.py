"""What a float layer would hold in the place of a quantized one, and the gradient that such a layer would give."""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant._errors import UnsupportedError
from reelquant.branches import Branch, branch_name
from reelquant.kernels import hadamard, unmixed
from reelquant.nn.layer_view import LayerView
from reelquant.nn.spec import mixes_of


def weight_of(layer: LayerView) -> Tensor:
    """The weight in float32, with the input's rewrite undone and the branches added. Its bias is :func:`bias_of`.

    Raises:
        UnsupportedError: if a branch is not a product with a weight, or the layer stores its outputs alone.
    """
    if layer.layout.folded:
        raise UnsupportedError(
            f"a temporal layer of shape {layer.weight_shape} stores its outputs alone (temporal: fold) and has no weight; quantize with "
            "temporal: table"
        )
    weight = _unscaled_weight(layer)
    weight = unmixed(hadamard(weight, 1) if layer.layout.rotate else weight, mixes_of(layer))
    for branch in layer.layout.branches:
        weight = weight + _branch_weight(layer, branch)
    return weight


def _branch_weight(layer: LayerView, branch: Branch) -> Tensor:
    share = branch.weight(layer.branch_tensors(branch), layer.weight_shape)
    if share is None:
        raise UnsupportedError(
            f"branch '{branch_name(branch)}' of a layer of shape {layer.weight_shape} is not a product with a weight, so the layer has "
            "no float weight and no gradient; run it as it is, or quantize without that branch"
        )
    return share


def _unscaled_weight(layer: LayerView) -> Tensor:
    """The weight that meets the input after it is mixed and rotated, the scales of input channels divided out."""
    weight = layer.packed.dequantize()
    return weight / _by_channel(layer, "pre_quant_scale", weight) if layer.layout.scale else weight


def _by_channel(layer: LayerView, name: str, weight: Tensor) -> Tensor:
    """A tensor with a number for each input channel, in the shape that goes with the weight's axes."""
    found = layer._buffers[name]
    assert found is not None
    return found.float().view(1, -1, *[1] * (weight.ndim - 2))


def bias_of(layer: LayerView) -> Tensor | None:
    """The bias without the compensation of the shift.

    None if there is none, or if that compensation is all that quantization made it for.
    """
    if layer.bias is None or not layer.layout.shift:
        return layer.bias
    weight = _unscaled_weight(layer)
    left = layer.bias.float() - (weight * _by_channel(layer, "pre_quant_shift", weight)).flatten(1).sum(1)
    return None if layer.bias_made and _is_rounding(left, layer.bias.float()) else left.to(layer.bias.dtype)


def _is_rounding(left: Tensor, bias: Tensor) -> bool:
    """Whether what is left of a bias is at most the rounding error of float16 and of a float32 sum whose terms cancel."""
    size, eps = bias.abs(), torch.finfo(torch.float16).eps
    return bool((left.abs() <= eps * (size + eps * size.amax())).all())


def input_gradient(layer: LayerView, gradient: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of an input, as if the input were not rounded.

    The weight is dequantized for it, so adapters train on quantized layers; the layer itself does not.

    Args:
        layer: whose output the gradient is of.
        gradient: of the output.
        shape: of the input.

    Raises:
        UnsupportedError: as :func:`weight_of`.
    """
    x = gradient.new_zeros(shape).requires_grad_()
    with torch.enable_grad():
        operands = layer.operands
        out = operands.product(operands.padded(x), weight_of(layer).to(gradient.dtype), None)
    return torch.autograd.grad(out, x, gradient)[0]
