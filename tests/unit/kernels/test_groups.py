"""Inputs in groups and scales of eight bits: one kernel of CPUs and the reference compute them, everything else says that it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from reelquant.checkpoint.export import assemble
from reelquant.graphs import refusals
from reelquant.kernels import KERNELS, backend, not_taken
from reelquant.kernels.cpu import int16_groups
from reelquant.nn import QuantLayer
from tests.single import build

CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {  # weight, input, what is not taken
    "input groups": (
        {"format": "int8", "granularity": "channel"},
        {"format": "int8", "granularity": "group-4", "dynamic": True},
        "inputs with a scale per group of channels",
    ),
    "scales of eight bits": ({"format": "int4", "granularity": "group-4", "scale": "e8m0"}, None, "scales of eight bits"),
    "nvfp4": (
        {"format": "e2m1", "granularity": "group-16", "scale": "e4m3"},
        {"format": "e2m1", "granularity": "group-16", "scale": "e4m3", "dynamic": True},
        "inputs with a scale per group of channels, scales of eight bits",
    ),
}


def layer(case: str) -> QuantLayer:
    torch.manual_seed(0)
    weight, inputs, _ = CASES[case]
    return build(nn.ModuleDict({"layer": nn.Linear(16, 8)}), ["layer"], [torch.randn(6, 16)], weight, inputs).layers["layer"]


@pytest.mark.skipif(int16_groups.available() is not None, reason=str(int16_groups.available()))
@pytest.mark.parametrize("case", CASES)
def test_one_kernel_takes_them(case: str) -> None:
    found, groups = layer(case), "int16 groups"
    kernel, refused = found.selected
    rounded = CASES[case][1] is not None  # it multiplies integers, so inputs have to be rounded
    assert kernel.name == (groups if rounded else "reference") and not found.simulated
    assert {name for name, why in refused.items() if CASES[case][2] in why} == set(refused) - {groups}
    assert rounded or refused[groups] == "the input stays float"


@pytest.mark.parametrize("case", CASES)
def test_the_reference_computes_what_no_kernel_takes(case: str) -> None:
    found = layer(case)
    with backend("reference"):
        assert found.kernel.name == "reference" and found.simulated == (CASES[case][1] is not None)
    for other in KERNELS["cuda"]():
        assert CASES[case][2] in (other.declines(found.operands) or "")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("takes", [refusals.TAKES, assemble.TAKES], ids=["graphs", "exporters"])
def test_graphs_and_exporters_refuse_them(case: str, takes: frozenset[str]) -> None:
    assert not_taken(layer(case).layout.features, takes) == CASES[case][2]
