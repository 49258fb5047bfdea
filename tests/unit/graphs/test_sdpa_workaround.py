"""Attention over as many tokens as heads: what a graph answers with any element-wise operator behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

openvino = pytest.importorskip("openvino", reason="pip install openvino", exc_type=ImportError)

from reelquant.graphs.sdpa_workaround import fix_ambiguous_sdpa, is_square  # noqa: E402

ops = openvino.opset13
DIM = 20
BEHIND: dict[str, tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]] = {
    "multiplied": (lambda node: ops.multiply(node, ops.constant(np.float32(3))), lambda x: x * 3),
    "rounded": (lambda node: ops.round(ops.multiply(node, ops.constant(np.float32([40]))), "half_to_even"), lambda x: (x * 40).round()),
    "gelu": (lambda node: ops.gelu(node, "erf"), F.gelu),
    "nothing": (lambda node: node, lambda x: x),
}
MASKS = {"all": (3, 8, 8, 24), "one for all clips": (1, 1, 8, 24), "rows": (8, 24)}


def sizes(*numbers: int) -> Any:
    return ops.constant(np.array(numbers, np.int64))


def attention(heads: int, mask: Any = None, causal: bool = False, behind: str = "nothing") -> Callable[..., Any]:
    """``[clips, tokens, channels]`` three times to the same, heads apart in between, as an operator of OpenVINO."""

    def built(*nodes: Any) -> Any:
        apart = [ops.transpose(ops.reshape(one, sizes(0, 0, heads, DIM), True), sizes(0, 2, 1, 3)) for one in nodes]
        masks = [] if mask is None else [ops.constant(mask.numpy())]
        joined = ops.transpose(ops.scaled_dot_product_attention(*apart, *masks, causal=causal), sizes(0, 2, 1, 3))
        return BEHIND[behind][0](ops.reshape(joined, sizes(0, 0, heads * DIM), True))

    return built


def expected(heads: int, tensors: list[Tensor], mask: Tensor | None, causal: bool, behind: str) -> Tensor:
    q, k, v = (one.unflatten(-1, (heads, DIM)).transpose(1, 2) for one in tensors)
    return BEHIND[behind][1](F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2).flatten(2))


def graph_of(built: Callable[..., Any], tensors: list[Tensor]) -> Any:
    given = [ops.parameter(list(one.shape), np.float32) for one in tensors]
    return openvino.Model([built(*given)], given)


def answer(graph: Any, tensors: list[Tensor]) -> Tensor:
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled([one.numpy() for one in tensors])[0].copy())


def tensors_of(heads: int, tokens: int, keys: int, clips: int = 3) -> list[Tensor]:
    return [torch.randn(clips, length, heads * DIM) for length in (tokens, keys, keys)]


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_as_many_tokens_as_heads_are_answered_as_torch_does(mask: str | None, behind: str) -> None:
    tensors = tensors_of(8, 8, 24)
    values = None if mask is None else torch.randn(MASKS[mask])
    graph = graph_of(attention(8, values, behind=behind), tensors)
    assert fix_ambiguous_sdpa(graph) == 1 and fix_ambiguous_sdpa(graph) == 0
    error = (answer(graph, tensors) - expected(8, tensors, values, False, behind)).abs()
    assert float(error.median()) <= 1e-5 and float(error.max()) <= (1 if behind == "rounded" else 1e-4)


def test_causal_attention_stays_so() -> None:
    tensors = tensors_of(4, 4, 4)
    graph = graph_of(attention(4, causal=True, behind="multiplied"), tensors)
    assert fix_ambiguous_sdpa(graph) == 1
    torch.testing.assert_close(answer(graph, tensors), expected(4, tensors, None, True, "multiplied"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("heads", "tokens"), [(4, 8), (1, 1), (8, 4)])
def test_other_attention_is_left_alone(heads: int, tokens: int) -> None:
    tensors = tensors_of(heads, tokens, 24)
    graph = graph_of(attention(heads, behind="multiplied"), tensors)
    assert fix_ambiguous_sdpa(graph) == 0
    assert not any(is_square(node) for node in graph.get_ops() if node.get_type_name() == "ScaledDotProductAttention")
    torch.testing.assert_close(answer(graph, tensors), expected(heads, tensors, None, False, "multiplied"), rtol=1e-4, atol=1e-5)
