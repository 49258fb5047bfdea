"""The split_invariant of a graph that lasts from step to step is cut off where that leaves the other split_invariant whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

openvino = pytest.importorskip("openvino", reason="pip install openvino", exc_type=ImportError)

from reelquant.graphs.parts import split_invariant  # noqa: E402

ops = openvino.opset13


def number(*values: int) -> Any:
    return ops.constant(np.array(values, np.int64))


def joined(text_tokens: Any) -> tuple[Any, Any]:
    """A text before a latent, multiplied, and the latent's share again: how many tokens to leave out comes from the text's shape."""
    latent, text = ops.parameter([1, 6, 4], np.float32), ops.parameter([1, text_tokens, 4], np.float32)
    wide = ops.matmul(text, ops.constant(np.eye(4, dtype=np.float32) * 2), False, False)
    both = ops.concat([wide, latent], 1)
    size = ops.gather(ops.shape_of(wide), number(1), number(0))
    rest = ops.slice(ops.exp(both), size, number(100), number(1), number(1))
    return openvino.Model([ops.result(rest)], [latent, text]), wide


def answer(graph: Any, *given: Any) -> Any:
    return openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(list(given))


def test_sizes_of_what_lasts_are_known_to_the_rest() -> None:
    latent, text = np.random.randn(1, 6, 4).astype(np.float32), np.random.randn(1, 3, 4).astype(np.float32)
    found = split_invariant(joined(3)[0], [False, True])
    assert found is not None
    first, rest, order = found
    rest.validate_nodes_and_infer_types()
    assert list(rest.output(0).get_shape()) == [1, 6, 4]
    once = answer(first, text)
    kept = [once[index] for index in range(len(first.outputs))]
    np.testing.assert_allclose(answer(rest, *[(latent, text)[index] for index in order], *kept)[0], np.exp(latent), rtol=1e-6)


def test_what_has_no_known_size_is_computed_in_every_step() -> None:
    assert split_invariant(joined(-1)[0], [False, True]) is None
