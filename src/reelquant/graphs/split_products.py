"""A product whose answer is split along its channels becomes one product for each part: the two halves of GEGLU, fused queries and keys.

OpenVINO 2026.4 copies every part number by number, which took 9 % of a step of ``tiny-unet``. A product with some rows of the weight writes
its part where it belongs at once. Every number is computed as before, by the same operators.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import openvino.opset13 as ops

Node = Any
SPLITS = ("Split", "VariadicSplit")
CUT = ("f32", "i8", "u8")  # numpy knows neither bfloat16 nor packed codes
ELEMENTWISE = {"Add": ops.add, "Subtract": ops.subtract, "Multiply": ops.multiply}


class Part(NamedTuple):
    """Channels ``begin`` to ``end`` of ``total``."""

    begin: int
    end: int
    total: int


def split_products(graph: Any) -> int:
    """Rewrite every such split of a graph, in place, where shapes are known; how many there were."""
    return sum(_rewritten(node) for node in graph.get_ordered_ops() if node.get_type_name() in SPLITS)


def _rewritten(split: Node) -> bool:
    """Whether the parts of this split are products of their own now."""
    whole, outputs = split.input_value(0), split.outputs()
    if any(one.get_partial_shape().is_dynamic for one in (whole, *outputs)):
        return False
    *rows, total = whole.get_shape()
    if any(list(one.get_shape())[:-1] != rows for one in outputs):  # along another axis
        return False
    ends = np.cumsum([0, *(list(one.get_shape())[-1] for one in outputs)]).tolist()
    found = [_of_product(whole, Part(*ends[index : index + 2], total)) for index in range(len(outputs))]
    if None in found:
        return False
    for output, part in zip(outputs, found, strict=True):
        for reader in output.get_target_inputs():
            reader.replace_source_output(part.output(0))
    return True


def _of_product(value: Node, part: Part) -> Node | None:
    """Some channels of a product and of what is added to it or multiplied by it. None if this is no such thing, or others read it whole."""
    node, kind = value.get_node(), value.get_node().get_type_name()
    readers = [one for one in value.get_target_inputs() if one.get_node().get_type_name() != "ShapeOf"]
    if len(readers) > 1:
        return None
    if kind == "MatMul":
        return _with_rows(node, part)
    if kind not in ELEMENTWISE:
        return None
    given = node.input_values()
    numbers = [_of_numbers(one, part) for one in given]
    found = [_of_product(one, part) if number is None else number for one, number in zip(given, numbers, strict=True)]
    return None if None in found or None not in numbers else ELEMENTWISE[kind](*found)


def _with_rows(product: Node, part: Part) -> Node | None:
    """A product with some rows of its weight, under its name."""
    facts, (given, weight) = product.get_attributes(), product.input_values()
    rows = _of_weight(weight, part) if facts["transpose_b"] and len(weight.get_partial_shape()) == 2 else None
    if rows is None:
        return None
    found = ops.matmul(given, rows, facts["transpose_a"], True)
    found.set_friendly_name(f"{product.get_friendly_name()}.{part.begin}")
    return found


def _of_weight(value: Node, part: Part) -> Node | None:
    """Some rows of a weight: a constant, or codes times scales."""
    node, kind = value.get_node(), value.get_node().get_type_name()
    if kind == "Constant":
        return _cut(node, part, 0)
    if kind == "Convert":
        rows = _of_weight(node.input_value(0), part)
        return None if rows is None else ops.convert(rows, node.get_output_element_type(0).to_dtype())
    if kind == "Multiply":
        found = [_of_weight(one, part) for one in node.input_values()]
        return None if None in found else ops.multiply(*found)
    return None


def _of_numbers(value: Node, part: Part) -> Node | None:
    """Some of the numbers per channel that a model holds, or the row of a table that the step chooses."""
    node, kind = value.get_node(), value.get_node().get_type_name()
    if kind == "Constant":
        return _cut(node, part, -1)
    if kind == "Gather" and node.input_value(0).get_node().get_type_name() == "Constant" and len(node.input_value(0).get_shape()) == 2:
        table, *rest = node.input_values()
        cut = _cut(table.get_node(), part, -1)
        return None if cut is None else ops.gather(cut, *rest)
    return None


def _cut(constant: Node, part: Part, axis: int) -> Node | None:
    """Some rows or columns of a constant; all of it where one number stands for all; None for numbers that numpy does not know."""
    shape = list(constant.get_output_shape(0))
    if not shape or shape[axis] == 1:
        return constant
    if shape[axis] != part.total or constant.get_output_element_type(0).get_type_name() not in CUT:
        return None
    return ops.constant(np.ascontiguousarray(constant.data.take(range(part.begin, part.end), axis)))
