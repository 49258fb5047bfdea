"""Attention over as many tokens as heads, which OpenVINO answers wrongly, in a form that it answers rightly.

OpenVINO 2026.4 takes the transposition of heads and tokens around an attention into its operator, and tells by shapes where an element-wise
operator behind it stands: with as many heads as tokens (8 heads over the 8 frames of a clip, in a UNet's motion modules) it mixes the two
up, 46 to 200 % off. Such an operator is a multiplication, an activation, or the rounding of the next layer's input. Heads that are
clips of their own leave nothing to mix up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino.opset13 as ops

KIND = "ScaledDotProductAttention"
OPERANDS = 4  # of its inputs: queries, keys, values, the mask; then the scale
Node = Any


def fix_ambiguous_sdpa(graph: Any) -> int:
    """Rewrite every such attention of a graph, in place, where shapes are known; how many there were."""
    found = [node for node in graph.get_ops() if node.get_type_name() == KIND and is_square(node)]
    for node in found:
        _replace(node)
    return len(found)


def is_square(node: Node) -> bool:
    """Whether queries are ``[clips, n, n, dim]`` with more than one head."""
    if any(one.get_partial_shape().is_dynamic for one in node.input_values()):
        return False
    shape = list(node.input_value(0).get_shape())
    return len(shape) == 4 and shape[1] == shape[2] > 1


def _replace(node: Node) -> None:
    clips, heads, *answer = node.get_output_shape(0)
    given = [_apart(one, clips, heads) if index < OPERANDS else one for index, one in enumerate(node.input_values())]
    attended = ops.scaled_dot_product_attention(*given, causal=node.get_attributes()["causal"])
    back = ops.reshape(attended, _sizes(clips, heads, *answer), False)
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(back.output(0))


def _apart(one: Node, clips: int, heads: int) -> Node:
    """``[clips, heads, rows, columns]`` or what is repeated to it: ``[clips * heads, 1, rows, columns]``. A mask of one number stays."""
    shape = list(one.get_shape())
    if len(shape) < 2:
        return one
    *_, rows, columns = shape
    whole = [clips, heads, rows, columns]
    full = one if shape == whole else ops.broadcast(one, _sizes(*whole))
    return ops.reshape(full, _sizes(clips * heads, 1, rows, columns), False)


def _sizes(*sizes: int) -> Node:
    return ops.constant(np.array(sizes, np.int64))
