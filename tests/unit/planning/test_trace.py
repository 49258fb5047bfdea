"""What a call computes and holds, followed without computing it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelquant.planning.heap import Event
from reelquant.planning.memory import running
from reelquant.planning.trace import AttentionCall, LayerCall, OperatorCall, Rounding, Shape, Trace, traced

TOKENS = 1000


class Feed(nn.Module):
    """A feed-forward behind attention."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.feed, self.scale = Feed(), nn.Parameter(torch.ones(8))
        self.register_buffer("table", torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(1, TOKENS, 2, 4).transpose(1, 2)
        x = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(1, TOKENS, 8)
        return self.feed(x * self.scale + self.table)


def followed(rounding: Rounding | None = None, model: nn.Module | None = None) -> Trace:
    with torch.device("meta"):
        model, x = model or Model(), torch.empty(1, TOKENS, 8)
    with torch.no_grad(), traced(model, *([] if rounding is None else [rounding])) as trace:
        model(x)
    return trace


def counted(trace: Trace, kind: type) -> dict[Any, int]:
    return {call: count for call, count in trace.calls.items() if isinstance(call, kind)}


def test_the_peak_is_that_of_the_widest_moment() -> None:
    narrow, wide = TOKENS * 8 * 4, TOKENS * 64 * 4
    # hidden numbers before and after the activation; the input of the feed-forward, and what its caller made it of
    assert followed().peak == 2 * wide + 2 * narrow


def test_layers_attention_and_operators_are_told_apart() -> None:
    trace, x = followed(), Shape((1, TOKENS, 8), torch.float32)
    assert counted(trace, LayerCall) == {LayerCall("feed.up", x): 1, LayerCall("feed.down", Shape((1, TOKENS, 64), torch.float32)): 1}
    assert counted(trace, AttentionCall) == {AttentionCall((1, 2, TOKENS, 4), (1, 2, TOKENS, 4), torch.float32, False): 1}
    operators = {call.operator: call for call in counted(trace, OperatorCall)}
    assert operators["aten::gelu.default"].moved == 2 * 4 * TOKENS * 64
    assert operators["aten::mul.Tensor"].moved == 4 * (2 * TOKENS * 8 + 8)
    assert not {"aten::view.default", "aten::addmm.default", "aten::transpose.int"} & operators.keys()


def test_what_is_taken_is_given_back() -> None:
    trace = followed()
    sizes: dict[int, int] = {}
    for event in trace.events:
        sizes[event.tensor] = sizes.get(event.tensor, 0) + event.size
    assert set(sizes.values()) == {0}


def test_codes_of_rounded_inputs_are_held_while_a_layer_runs() -> None:
    layer = nn.Linear(8, 2, device="meta")
    floats = TOKENS * 2 * 4
    assert followed(model=layer).peak == floats
    assert followed(Rounding({"": 1.0}), layer).peak == floats + TOKENS * 8  # a byte for every number of the input


def test_a_convolution_holds_its_input_and_weight_twice_on_a_cpu_only() -> None:
    layer, x = nn.Conv1d(8, 2, 3, device="meta"), torch.empty(1, 8, TOKENS, device="meta")
    with torch.no_grad(), traced(layer) as trace:
        layer(x)
    output, copies = 2 * (TOKENS - 2) * 4, 8 * TOKENS * 4 + 2 * 8 * 3 * 4
    assert running(trace, "cuda") == trace.peak == output
    assert running(trace, "cpu") == pytest.approx(output + copies - 2 * 8 * 3 * 4, abs=1000)  # the weight is small enough for any hole


def test_of_what_runs_once_the_middle_of_least_and_most_is_taken() -> None:
    size = 1 << 20
    events = [Event(0, 3 * size), Event(0, -3 * size), Event(1, 2 * size), Event(1, -2 * size)]
    trace = Trace(events=events)
    assert running(trace, "cpu") == pytest.approx(3 * size, rel=1e-3)
    assert running(trace, "cpu", once=True) == pytest.approx((3 + 5) / 2 * size, rel=1e-3)


def test_a_block_of_tokens_at_a_time_holds_one_block_and_counts_for_all() -> None:
    trace = followed(Rounding({}, {"feed": (100, 8)}))
    assert trace.peak < followed().peak / 2
    assert counted(trace, LayerCall)[LayerCall("feed.up", Shape((1, 100, 8), torch.float32))] == TOKENS // 100


def test_a_model_that_asks_for_a_number_is_given_one() -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if bool((x > 0).all()) else x + x.sum().item()

    trace = followed(model=Asks())
    assert any(call.operator == "aten::add.Tensor" for call in counted(trace, OperatorCall))
