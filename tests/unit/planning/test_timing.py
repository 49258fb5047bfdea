"""Times of pieces of work: cut where they are long, kept where they are known."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from reelquant.formats import Granularity, Int, QuantSpec
from reelquant.nn import QuantLayer
from reelquant.planning.layers import float_layer, quantized_layer
from reelquant.planning.timing import Timings, attention_work, layer_key, layer_work, operator_work, seconds_of
from reelquant.planning.trace import AttentionCall, LayerCall, OperatorCall, Shape
from reelquant.stages import Specs

SPECS = Specs(QuantSpec(Int(8), Granularity("channel")), QuantSpec(Int(8), Granularity("token", axis=-1), dynamic=True))


def test_what_is_known_is_not_measured_again(tmp_path: Path) -> None:
    made: list[str] = []

    def work() -> tuple[object, float]:
        made.append("work")
        return (lambda: None), 2.0

    first = Timings(folder=tmp_path)
    first.measure({"a": work})
    again = Timings(folder=tmp_path)
    again.measure({"a": work})
    assert made == ["work"] and again.seconds == first.seconds
    first.file.write_text("{")
    assert Timings(folder=tmp_path).seconds == {}


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    timings = Timings(folder=tmp_path / "file" / "timings")
    timings.measure({"a": lambda: ((lambda: None), 1.0)})
    assert "a" in timings.seconds


def test_a_time_is_that_of_one_call() -> None:
    assert 0.002 <= seconds_of(lambda: time.sleep(0.002), "other", repeats=1) < 0.2  # of several in a sample, on a busy machine


def test_layers_of_other_numbers_or_inputs_have_other_keys() -> None:
    layer = nn.Linear(8, 4, device="meta")
    shapes = (Shape((1, 5, 8), torch.float32), Shape((1, 5, 8), torch.bfloat16), Shape((1, 6, 8), torch.float32))
    assert len({layer_key(layer, specs, shape) for specs in (None, SPECS) for shape in shapes}) == 6


def test_a_long_input_is_cut_and_its_time_scaled() -> None:
    layer = nn.Linear(16, 8, device="meta")
    work, factor = layer_work(layer, None, LayerCall("a", Shape((2, 4096, 16), torch.float32)), "cpu")
    assert factor == 8 and work().shape == (1024, 8)
    conv = nn.Conv3d(4, 8, 3, padding=1, device="meta")
    work, factor = layer_work(conv, None, LayerCall("a", Shape((1, 4, 16, 64, 64), torch.float32)), "cpu")
    made = work()
    assert factor * made[0, 0].numel() == 16 * 64 * 64 and made[0, 0].numel() <= 4096


def test_attention_keeps_its_keys() -> None:
    call = AttentionCall((1, 2, 4096, 16), (1, 2, 9000, 16), torch.float32, False)
    work, factor = attention_work(call, False, "cpu")
    assert factor * work().numel() == 2 * 4096 * 16


def test_operators_are_called_again_or_copied_for() -> None:
    x = Shape((1, 1 << 20, 64), torch.float32)
    work, factor = operator_work(OperatorCall("aten::mul.Tensor", (x, Shape((64,), torch.float32)), (), 8), "cpu")
    assert factor * work().numel() == x.numel and work().numel() <= 1 << 24
    indices = (Shape((10, 4), torch.float32), (None, Shape((3, 3), torch.int64), Shape((2,), torch.int64)))
    work, factor = operator_work(OperatorCall("aten::index.Tensor", indices, (), 8000), "cpu")
    assert factor * work().numel() * 8 == 8000


def test_layers_to_time_have_the_shapes_of_the_model(recwarn: pytest.WarningsRecorder) -> None:
    stock = nn.Linear(64, 32, device="meta")
    made = quantized_layer(stock, SPECS, torch.float32, "cpu")
    assert isinstance(made, QuantLayer) and made(torch.randn(3, 64)).shape == (3, 32)
    assert float_layer(stock, torch.float32, "cpu")(torch.randn(3, 64)).isfinite().all()
    assert stock.weight.is_meta
