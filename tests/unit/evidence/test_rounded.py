"""The noise floor of processors without bfloat16: float32 tensors whose numbers are those of bfloat16."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from reelquant.evidence import machine, run
from reelquant.evidence.judging import Options
from reelquant.evidence.rounded import round_to_bf16
from reelquant.evidence.sampling import FLOORS, ClipSource


def coarse(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32 and torch.equal(tensor, tensor.bfloat16().float())


def test_weights_and_what_layers_give_have_the_numbers_of_bf16_and_stay_float32() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16), nn.Conv1d(16, 8, 1))
    x = torch.randn(16, 32)
    before = net[0](x)
    round_to_bf16(SimpleNamespace(components={"net": net, "tokenizer": object()}))
    after = net[0](x)
    assert all(map(coarse, net.parameters())) and coarse(after)
    assert 0 < (after - before).abs().max() < 0.05
    assert not coarse(net[1](after))  # norms are computed, and left, in float32


def test_the_floor_is_rounded_where_bf16_would_take_many_times_as_long(monkeypatch: Any) -> None:
    options = Options(("psnr",))
    for has, name in ((True, "bf16"), (False, "rounded")):
        monkeypatch.setattr(run, "multiplies_bf16", lambda device, has=has: has)
        assert run._default_floor(options, torch.float32) == [name]
        assert run._default_floor(options, torch.bfloat16) == ["compiled"]
        rounded = FLOORS["rounded"](ClipSource("tiny-dit"))
        assert ("would take several times as long" in run._about("rounded", rounded)) is not has


def test_a_processor_has_bf16_if_any_of_its_instructions_has(monkeypatch: Any) -> None:
    for known, has in (({"avx2": True, "avx512_bf16": False}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        assert machine.multiplies_bf16("cpu") is has
    assert machine.multiplies_bf16("cuda")
