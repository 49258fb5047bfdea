"""A feature that code does not know is refused: by kernels, by graphs and by exporters, never silently ignored."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant.checkpoint.export import assemble
from reelquant.kernels import KERNELS, REFERENCE, Kernel, Operands, Scaling, select
from reelquant.kernels.mixed_input import mixing
from reelquant.nn import LayerLayout, QuantLinear, TensorLayout


@dataclass(frozen=True, eq=False)
class Bent(Operands):
    """Operands with a field that nothing knows."""

    bend: float = 0.0


def bent(layer: QuantLinear, bend: float) -> Bent:
    operands = layer.operands
    return Bent(**{field.name: getattr(operands, field.name) for field in fields(operands)}, bend=bend)


@dataclass(frozen=True)
class BentLayout(LayerLayout):
    """A layout with a field that nothing knows."""

    bend: float = 0.0


@pytest.fixture
def layer() -> QuantLinear:
    layout = LayerLayout(TensorLayout("int8", "channel"), TensorLayout("int8", "tensor"))
    new = QuantLinear(8, 4, True, layout)
    new.weight.data.random_(-9, 9)
    for tensor in (new.weight_scale, new.input_scale, new.bias.data):
        tensor.fill_(0.1)
    return new


def test_fields_in_use_are_features(layer: QuantLinear) -> None:
    assert layer.operands.features == {"input"}
    assert replace(layer.operands, rotate=True, shift=torch.zeros(8)).features == {"input", "rotate", "shift"}
    assert bent(layer, 0.0).features == {"input"} and bent(layer, 1.0).features == {"input", "bend"}
    assert layer.features == {"input"} and replace(layer.layout, slots=3, bias=False).features == {"input", "slots"}


@pytest.mark.parametrize("device", list(KERNELS))
def test_every_kernel_refuses_a_feature_that_it_does_not_know(layer: QuantLinear, device: str) -> None:
    if device == "cuda":
        pytest.importorskip("triton")
    for kernel in (*KERNELS[device](), REFERENCE):
        assert "the feature 'bend'" in str(kernel.declines(bent(layer, 1.0))), kernel.name
        assert "bend" not in str(kernel.declines(bent(layer, 0.0))), kernel.name


@pytest.mark.parametrize("wanted", ["auto", "reference"])
def test_a_layer_that_nothing_computes_is_an_error(layer: QuantLinear, wanted: str) -> None:
    assert select(bent(layer, 0.0), "cpu", wanted)
    with pytest.raises(UnsupportedError, match=r"\(4, 8\) on 'cpu'.*does not take the feature 'bend'"):
        select(bent(layer, 1.0), "cpu", wanted)


def test_graphs_refuse_it(layer: QuantLinear) -> None:
    pytest.importorskip("openvino")
    from reelquant.graphs.refusals import refuse_model

    model = nn.Sequential(layer)
    layer.layout = BentLayout(layer.layout.weight, layer.layout.input)
    refuse_model(model)
    layer.layout = replace(layer.layout, bend=1.0)  # type: ignore[call-arg]
    with pytest.raises(UnsupportedError, match="Sequential does not run as an OpenVINO graph: '0' has the feature 'bend'"):
        refuse_model(model)


def test_exporters_refuse_it(layer: QuantLinear) -> None:
    from reelquant.checkpoint.export.source import Facts

    def source(bend: float) -> Any:
        facts = Facts("layer", BentLayout(layer.layout.weight, bend=bend), True, (4, 8), True, False)
        return type("Source", (), {"layers": {"layer": facts}, "folder": Path(), "homeless": (), "floats": ()})()

    assemble.check_features(source(0.0))
    with pytest.raises(UnsupportedError, match="layer 'layer' has the feature 'bend'"):
        assemble.check_features(source(1.0))


def test_layers_that_mix_one_tensor_alike_mix_it_once(layer: QuantLinear) -> None:
    """And so they share its codes; a change in place, other operations or another tensor make another one."""
    seen: list[Tensor] = []

    def watched(operands: Operands) -> Any:
        return lambda x, slot: seen.append(x) or x

    kernel = mixing(Kernel("watched", frozenset({"input"}), lambda operands: None, watched))
    first, second = (Scaling(torch.full((8,), value)) for value in (2.0, 4.0))
    one, same, other = (kernel.prepare(replace(layer.operands, mix=(mix,))) for mix in (first, Scaling(torch.full((8,), 2.0)), second))
    x = torch.ones(3, 8)
    one(x, 0), same(x, 0), other(x, 0), other(x.clone(), 0)
    assert seen[0] is seen[1] and seen[1] is not seen[2] and seen[2] is not seen[3]
    one(x, 0)
    x.mul_(2)
    one(x, 0)
    assert float(seen[-1][0, 0]) == 2 * float(seen[-2][0, 0]) == 1.0
    kept = weakref.ref(seen[-1])
    seen.clear()
    assert kept() is not None
    del x
    assert kept() is None  # memory goes with the input
