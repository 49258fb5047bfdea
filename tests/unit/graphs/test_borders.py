"""The border of a convolution as a bias by position."""

from __future__ import annotations

import numpy as np
import pytest
import torch

openvino = pytest.importorskip("openvino", reason="pip install openvino", exc_type=ImportError)

from reelquant.graphs.borders import added_by, by_position, keeps_sizes  # noqa: E402
from reelquant.kernels import Window  # noqa: E402
from reelquant.kernels.operands import CONVOLVE  # noqa: E402

CASES = {
    "pictures": ((3, 3), (6, 5)),
    "pictures of one row": ((3, 3), (1, 4)),
    "as large as the window": ((5, 5), (2, 5)),
    "frames": ((3, 1, 1), (4, 3, 2)),
    "clips": ((3, 3, 3), (2, 4, 3)),
    "a row": ((7,), (5,)),
}


@pytest.mark.parametrize(("kernel", "sizes"), CASES.values(), ids=CASES)
def test_a_border_adds_what_padding_with_its_values_adds(kernel: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, border = (torch.randn(shape, generator=generator) for shape in ((2, 3, *sizes), (4, 3, *kernel), (3,)))
    around = [size // 2 for size in reversed(kernel) for _ in range(2)]
    middle = border.reshape(-1, *[1] * len(kernel))
    padded = torch.nn.functional.pad(x - middle, around) + middle
    expected = CONVOLVE[len(kernel)](padded, weight)
    given = openvino.opset13.parameter([2, 3, *sizes], np.float32)
    graph = openvino.Model([by_position(added_by(border, weight), kernel, given)], [given])
    bias = torch.from_numpy(openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x.numpy()])[0].copy())
    torch.testing.assert_close(CONVOLVE[len(kernel)](torch.nn.functional.pad(x, around), weight) + bias, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("window", "kernel", "expected"),
    [
        (Window((1, 1), (1, 1, 1, 1), (1, 1)), (3, 3), True),
        (Window((1, 1, 1), (0, 0, 0, 0, 1, 1), (1, 1, 1)), (3, 1, 1), True),
        (Window((2, 2), (1, 1, 1, 1), (1, 1)), (3, 3), False),
        (Window((1, 1), (2, 2, 2, 2), (2, 2)), (3, 3), False),
        (Window((1, 1), (), (1, 1)), (3, 3), False),
        (Window((1, 1), (1, 2, 1, 2), (1, 1)), (3, 3), False),
        (Window((1, 1), (), (1, 1)), (1, 1), False),
        (Window((1, 1), (1, 1, 1, 1), (1, 1)), (4, 4), False),
        (None, (), False),
    ],
)
def test_which_windows_keep_sizes(window: Window | None, kernel: tuple[int, ...], expected: bool) -> None:
    assert keeps_sizes(window, kernel) is expected
