"""All layers of a denoiser are prepared by its first call, before its first activation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from reelquant.nn import quantized_layers, residency, start_runtime, stop_runtime
from reelquant.nn.layers import QuantLayer
from tests.single import build

WIDTH = 16


class Seeing(nn.Module):
    """A denoiser that notes, as it begins, which of its layers are prepared."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(()))  # a parameter of its own: its tokens are not probed for independence
        self.seen: list[list[bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.seen.append([layer.residency.current is not None for layer in quantized_layers(self).values()])
        return self.two(self.one(x).sin()) * self.gain


@pytest.fixture
def model() -> Seeing:
    made = Seeing().eval()
    for name, layer in list(made.named_children()):
        weight = {"format": "int8", "granularity": "channel"}
        built = build(nn.ModuleDict({"layer": layer}), ["layer"], [torch.randn(64, WIDTH)], weight, {"format": "int8"})
        setattr(made, name, built.layers["layer"])
    return made


X = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_first_call_prepares_every_layer_before_it_computes(model: Seeing) -> None:
    start_runtime(model)
    start_runtime(model)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        before = len(one._forward_pre_hooks)
        one(X)
        assert one.seen == [[True, True]]
        assert len(one._forward_pre_hooks) == before - 1  # later calls are not looked at
    assert torch.equal(model(X), twin(X))


@torch.no_grad()
def test_layers_of_one_model_look_for_outdated_kernels_once(model: Seeing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them looked at all layers in use, which took time that grew with their square."""
    looked: list[None] = []
    monkeypatch.setattr(residency, "_release_outdated", lambda: looked.append(None))
    start_runtime(model)
    looked.clear()
    model(X)
    assert model.seen == [[True, True]] and len(looked) == 1
    with residency.many_at_once(), residency.many_at_once():
        model.one.release()
        model.one(X)
    assert len(looked) == 2
    model.two.release()
    model.two(X)
    assert len(looked) == 3  # a layer that is prepared alone looks again


@torch.no_grad()
def test_without_the_runtime_a_layer_is_prepared_when_it_runs(model: Seeing) -> None:
    start_runtime(model)
    stop_runtime(model)
    model(X)
    model(X)
    assert model.seen == [[False, False], [True, True]]


@torch.no_grad()
def test_a_model_whose_parts_are_moved_by_others_is_left_to_them(model: Seeing) -> None:
    start_runtime(model)
    assert isinstance(model.one, QuantLayer)
    forward = model.one.forward
    model.one.forward = lambda x: forward(x)  # as accelerate and group offloading do
    model(X)
    assert model.seen == [[False, False]]


@torch.no_grad()
def test_graphs_are_whole_and_prepare_nothing_themselves(model: Seeing) -> None:
    start_runtime(model)
    expected = copy.deepcopy(model)(X)
    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="eager")(X)
    assert torch.equal(found, expected) and model.seen == []
