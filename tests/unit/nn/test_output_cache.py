"""Outputs of layers that see the prompt only: given again where they are the same, and never where they are not."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reelquant.clock import Clock
from reelquant.nn import output_cache, quantized_layers, start_clock, start_runtime, stop_runtime
from reelquant.nn.output_cache import OutputCache
from reelquant.nn.runners.kernel import KernelProduct
from reelquant.nn.runners.other_bits import OtherBits
from tests.single import build

WIDTH = 16


class Counted:
    """A computation that counts how often it is made."""

    def __init__(self) -> None:
        self.calls = 0

    def of(self, x: Tensor) -> Callable[[], Tensor]:
        def compute() -> Tensor:
            self.calls += 1
            return x * 2

        return compute


@pytest.fixture
def counted() -> Counted:
    return Counted()


def once(outputs: OutputCache, counted: Counted, x: Tensor, activation: str = "") -> Tensor:
    answer = outputs.once(x, (activation,), counted.of(x))
    assert torch.equal(answer, x * 2)
    return answer


def test_two_inputs_that_take_turns_are_computed_once_each(counted: Counted) -> None:
    outputs, pair = OutputCache(), [torch.randn(4, 8), torch.randn(4, 8)]
    for _ in range(5):
        for x in pair:
            once(outputs, counted, x.clone())
    assert counted.calls == 2
    once(outputs, counted, torch.randn(4, 8))
    assert len(outputs.entries) == output_cache.PROMPTS


def test_any_number_any_shape_any_activation_counts(counted: Counted) -> None:
    outputs, x = OutputCache(), torch.randn(4, 8)
    once(outputs, counted, x)
    other = x.clone()
    other[3, 7] = torch.nextafter(other[3, 7], torch.tensor(9.0))
    for different in (other, x[:2], x.double(), x[None]):
        calls = counted.calls
        once(outputs, counted, different)
        assert counted.calls == calls + 1
    once(outputs, counted, x)
    calls = counted.calls
    once(outputs, counted, x, "gelu")
    assert counted.calls == calls + 1


@pytest.mark.parametrize("which", ["input", "output"])
def test_what_was_written_to_is_not_given_again(counted: Counted, which: str) -> None:
    outputs, x = OutputCache(), torch.randn(4, 8)
    answer = once(outputs, counted, x)
    (x if which == "input" else answer[1:].view(-1)).add_(1)
    once(outputs, counted, x)
    assert counted.calls == 2


def test_inputs_that_hold_nan_are_told_apart_by_the_tensor_alone() -> None:
    outputs, x = OutputCache(), torch.full((2, 2), torch.nan)
    answers = [outputs.once(one, (), lambda: torch.zeros(2)) for one in (x, x, x.clone())]
    assert answers[0] is answers[1] and answers[0] is not answers[2]


def test_inference_tensors_and_gradients_are_computed_every_time(counted: Counted) -> None:
    outputs = OutputCache()
    with torch.inference_mode():
        x = torch.randn(2, 2)
        once(outputs, counted, x)
        once(outputs, counted, x)
    y = torch.randn(2, 2, requires_grad=True)
    once(outputs, counted, y)
    once(outputs, counted, y)
    assert counted.calls == 4 and not outputs.entries
    with torch.inference_mode():  # a normal tensor in, an inference tensor out, which has no version counter
        z = torch.zeros(2, 2)
    plain = torch.randn(2, 2)
    assert outputs.once(plain, (), lambda: z) is z and not outputs.entries


def test_little_memory_is_held_and_given_back(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    before = output_cache.held()
    monkeypatch.setattr(output_cache, "AT_MOST", before + 1000)
    outputs, other = OutputCache(), OutputCache()
    once(outputs, counted, torch.randn(200))  # 800 bytes
    assert output_cache.held() == before + 800
    x = torch.randn(100)
    once(other, counted, x)
    once(other, counted, x)
    assert counted.calls == 3 and not other.entries  # no room
    del outputs
    gc.collect()
    assert output_cache.held() == before
    once(other, counted, x)
    once(other, counted, x)
    assert counted.calls == 4


def test_threads_get_what_is_theirs(counted: Counted) -> None:
    outputs, failed = OutputCache(), []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        mine = [torch.randn(32, 32, generator=generator) for _ in range(3)]
        for index in range(200):
            x = mine[index % 3]
            if not torch.equal(outputs.once(x, (), lambda x=x: x * 2), x * 2):
                failed.append(index)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not failed


class Attending(nn.Module):
    """A denoiser with a layer for the prompt and one for the latent."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor | None = None) -> Tensor:
        return self.gain * (self.query(hidden_states) @ self.key(encoder_hidden_states).mT)


@pytest.fixture
def model() -> Attending:
    made = Attending().eval()
    for name, role in (("key", "prompt"), ("query", "main")):
        layer = nn.ModuleDict({"layer": made.get_submodule(name)})
        setattr(made, name, build(layer, ["layer"], [torch.randn(64, WIDTH)], {"format": "int8"}, None, role=role).layers["layer"])
    return made


def watch(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers that compute, as they do."""
    names, computed = {id(layer.residency): name for name, layer in quantized_layers(model).items()}, []
    call, protect = KernelProduct.__call__, OtherBits._runner

    def product(link: KernelProduct, *args: Any) -> Tensor:
        computed.append(names[id(link.residency)])
        return call(link, *args)

    def protected(link: OtherBits) -> Any:
        computed.append(names[id(link.layer.residency)])
        return protect(link)

    monkeypatch.setattr(KernelProduct, "__call__", product)
    monkeypatch.setattr(OtherBits, "_runner", protected)
    return computed


@torch.no_grad()
def test_layers_of_the_prompt_compute_once_a_clip(model: Attending, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [layer.layout.step_invariant for layer in quantized_layers(model).values()] == [True, False]
    texts, latents = torch.randn(2, 1, 5, WIDTH), torch.randn(4, 1, 7, WIDTH)
    expected = [model(x, text) for x in latents for text in texts]
    start_runtime(model)
    computed = watch(model, monkeypatch)
    answers = [model(x, text) for x in latents for text in texts]
    assert all(torch.equal(one, other) for one, other in zip(answers, expected, strict=True))
    assert computed.count("key") == 2 and computed.count("query") == 8
    stop_runtime(model)
    model(latents[0], texts[0])
    model(latents[0], texts[0])
    assert computed.count("key") == 4


@torch.no_grad()
@pytest.mark.parametrize("name", ["weight", "weight_scale", "bias"])
def test_other_numbers_have_other_outputs(model: Attending, name: str) -> None:
    """Loaded, written to where they lie, or put in their place: what a layer without the runtime sees, this one does."""
    x, text = torch.randn(1, 7, WIDTH), torch.randn(1, 5, WIDTH)
    start_runtime(model)
    before = model(x, text)
    model.key.load_state_dict({key: -value if key == name else value for key, value in model.key.state_dict().items()})
    loaded = model(x, text)
    assert not torch.allclose(loaded, before)
    tensor = getattr(model.key, name)
    tensor.neg_()
    written = model(x, text)
    model.key.keeps = False
    assert torch.equal(written, model(x, text)) and (name == "weight_scale" or torch.equal(written, before))
    model.key.keeps = True
    model(x, text)
    tensor.data = tensor.data.clone().mul_(3) if name == "bias" else tensor.data.clone()
    replaced = model(x, text)
    model.key.keeps = False
    assert torch.equal(replaced, model(x, text))


@torch.no_grad()
def test_scales_per_step_and_protected_steps_are_computed(model: Attending, monkeypatch: pytest.MonkeyPatch) -> None:
    start_clock(model, Clock((900.0, 100.0), (0,)), "timestep")
    start_runtime(model)
    computed = watch(model, monkeypatch)
    x, text = torch.randn(1, 7, WIDTH), torch.randn(1, 5, WIDTH)
    for time in (900.0, 900.0, 100.0, 100.0):
        model(x, text, torch.tensor([time]))
    assert computed.count("key") == 3
    model.key.layout = replace(model.key.layout, slots=2)
    start_runtime(model)
    assert not model.key.keeps


@torch.no_grad()
def test_compiled_graphs_keep_nothing(model: Attending, monkeypatch: pytest.MonkeyPatch) -> None:
    start_runtime(model)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    computed = watch(model, monkeypatch)
    x, text = torch.randn(1, 7, WIDTH), torch.randn(1, 5, WIDTH)
    expected = model(x, text)
    computed.clear()
    for _ in range(3):
        assert torch.equal(compiled(x, text), expected)
    assert computed.count("key") == 3
