"""A product whose answer is split: the same numbers from products of parts, and what must stay as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

openvino = pytest.importorskip("openvino", reason="pip install openvino", exc_type=ImportError)

from reelquant.graphs.split_products import split_products  # noqa: E402
from reelquant.graphs.trace import as_number  # noqa: E402

ops = openvino.opset13
ROWS, WIDTH, OUT = 5, 8, 12
RANDOM = np.random.default_rng(0)


def number(value: Any) -> Any:
    return ops.constant(np.array(value, np.int64))


def floats(*shape: int) -> Any:
    return ops.constant(RANDOM.normal(size=shape).astype(np.float32))


def codes() -> Any:
    """A weight as a quantized layer has it."""
    whole = ops.constant(RANDOM.integers(-128, 128, (OUT, WIDTH)).astype(np.int8))
    return ops.multiply(ops.convert(whole, np.float32), floats(OUT, 1))


def product(x: Any, weight: Any) -> Any:
    node = ops.matmul(x, weight, False, True)
    node.set_friendly_name("reelquant.7")
    return node


def of_step(x: Any) -> Any:
    """Scales and biases of the step, from tables."""
    rows = [ops.gather(floats(3, width), number(1), number(0)) for width in (1, OUT)]
    return ops.add(ops.multiply(product(x, codes()), rows[0]), rows[1])


SPLIT: dict[str, Callable[[Any], Any]] = {
    "floats": lambda x: product(x, floats(OUT, WIDTH)),
    "codes and a bias": lambda x: ops.add(product(x, codes()), floats(OUT)),
    "scales of the step": of_step,
    "a branch": lambda x: ops.add(product(x, codes()), product(ops.matmul(x, floats(2, WIDTH), False, True), floats(OUT, 2))),
    "one scale": lambda x: ops.multiply(product(x, codes()), floats(1)),
    "a scale per row of the input": lambda x: ops.multiply(product(x, codes()), floats(ROWS, 1)),
    "two products multiplied": lambda x: ops.multiply(product(x, codes()), product(x, codes())),
}
KEPT: dict[str, Callable[[Any], Any]] = {
    "no product": lambda x: ops.concat([x, floats(ROWS, OUT - WIDTH)], 1),
    "an activation": lambda x: ops.relu(product(x, codes())),
    "a weight in bfloat16": lambda x: product(x, ops.convert(ops.constant(np.ones((OUT, WIDTH)), openvino.Type.bf16), np.float32)),
    "not transposed": lambda x: ops.matmul(x, floats(WIDTH, OUT), False, False),
}


def graph_of(built: Callable[[Any], Any], axis: int = -1, sizes: list[int] | None = None) -> Any:
    given = ops.parameter([ROWS, WIDTH], np.float32)
    whole = built(given)
    split = ops.variadic_split(whole, number(axis), number(sizes)) if sizes else ops.split(whole, number(axis), 2)
    return openvino.Model([ops.abs(one) for one in split.outputs()], [given])


def answers(graph: Any, x: Any) -> list[Any]:
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [compiled([x])[index].copy() for index in range(len(graph.get_results()))]


def kinds(graph: Any) -> list[str]:
    return [node.get_type_name() for node in graph.get_ordered_ops()]


@pytest.mark.parametrize("sizes", [None, [4, 8], [3, 4, 5]], ids=str)
@pytest.mark.parametrize("built", SPLIT.values(), ids=SPLIT)
def test_parts_are_the_same_numbers(built: Callable[[Any], Any], sizes: list[int] | None) -> None:
    graph, x = graph_of(built, sizes=sizes), RANDOM.normal(size=(ROWS, WIDTH)).astype(np.float32)
    before = answers(graph.clone(), x)
    assert split_products(graph) == 1
    assert not {"Split", "VariadicSplit"} & set(kinds(graph))
    for one, other in zip(answers(graph, x), before, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), torch.from_numpy(other), rtol=1e-5, atol=1e-5)


def test_parts_bear_the_number_of_their_layer() -> None:
    graph = graph_of(SPLIT["codes and a bias"])
    split_products(graph)
    found = [as_number(node.get_friendly_name()) for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul"]
    assert found == [7, 7]


@pytest.mark.parametrize("built", KEPT.values(), ids=KEPT)
def test_other_splits_stay(built: Callable[[Any], Any]) -> None:
    graph = graph_of(built)
    assert split_products(graph) == 0
    assert "Split" in kinds(graph)


def test_a_split_of_rows_stays() -> None:
    assert split_products(graph_of(SPLIT["floats"], axis=0, sizes=[2, 3])) == 0


def test_a_product_that_others_read_whole_stays() -> None:
    given = ops.parameter([ROWS, WIDTH], np.float32)
    whole = product(given, codes())
    graph = openvino.Model([*ops.split(whole, number(-1), 2).outputs(), ops.relu(whole).output(0)], [given])
    assert split_products(graph) == 0
