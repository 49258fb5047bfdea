"""Which modules treat every token alone is found by trying; in blocks they answer as before, to the last bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from reelquant import UnsupportedError
from reelquant.clock import Clock
from reelquant.nn import quantized_layers, start_clock, start_runtime, stop_runtime
from reelquant.nn.around import tokenwise
from reelquant.nn.around.class_patch import ClassPatch
from reelquant.nn.around.fuse import Fused
from reelquant.nn.around.tokenwise import Tokenwise, block_tokens, unblock_tokens
from tests.single import build

WIDTH = 16


def quantized(module: nn.Module, **inputs: Any) -> nn.Module:
    """A model that is one module, its linear layers quantized; calibrated over two steps."""
    model = nn.ModuleDict({"part": module})
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            samples = [torch.randn(64, layer.in_features), 3 * torch.randn(64, layer.in_features)]
            weight = {"format": "int8", "granularity": "channel"}
            built = build(nn.ModuleDict({"layer": layer}), ["layer"], samples, weight, {"format": "int8", **inputs})
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = built.layers["layer"]
    return model.eval()


class Gated(nn.Module):
    """Feed-forward with a gate, as in large language models."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


class Neighbours(nn.Module):
    """Looks at the token before."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x + x.roll(1, 1)))


class Places(Neighbours):
    """Treats the first token in another way."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :1] * 2, x[:, 1:]], 1)
        return self.down(self.up(x))


class Named(nn.Module):
    """Parts with names that anything may have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.names = nn.ModuleList([nn.Linear(WIDTH, 32)]), nn.ModuleList([nn.Linear(32, WIDTH)])
        self.rows, self.width, self.number, self.activation = nn.Identity(), nn.Identity(), nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.names[0](self.activation(self.layers[0](self.number(self.width(self.rows(x))))))


TOKENWISE = {
    "gelu": lambda: FeedForward(WIDTH, activation_fn="gelu-approximate"),
    "geglu": lambda: FeedForward(WIDTH, activation_fn="geglu"),
    "gated": Gated,
    "names of parts": Named,
}
OTHERS = {
    "attention": lambda: Attention(WIDTH, heads=2, dim_head=8),
    "neighbours": Neighbours,
    "places": Places,
    "one layer": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()),
    "numbers of its own": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)),
}


@pytest.fixture
def blocks_of_64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenwise, "ACTIVATIONS_AT_ONCE", 1)


@pytest.mark.usefixtures("blocks_of_64")
@pytest.mark.parametrize("name", TOKENWISE)
@pytest.mark.parametrize("shape", [(1, 300), (3, 100), (2, 5, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_answer_as_the_whole(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = quantized(TOKENWISE[name]()).to(dtype)
    x = torch.randn(*shape, WIDTH).to(dtype)
    with torch.no_grad():
        expected = model["part"](x)
        assert block_tokens(model) == ["part"] and block_tokens(model) == []
        sizes: list[int] = []
        first = next(iter(quantized_layers(model).values()))
        run = first.activated
        first.activated = lambda x, *rest: sizes.append(x.numel() // WIDTH) or run(x, *rest)  # type: ignore[method-assign]
        assert torch.equal(model["part"](x), expected) and max(sizes) <= 64 < sum(sizes)
    unblock_tokens(model)
    assert not isinstance(model["part"], Tokenwise)


@pytest.mark.parametrize("name", OTHERS)
def test_what_mixes_tokens_is_left_alone(name: str) -> None:
    model = quantized(OTHERS[name]())
    assert block_tokens(model) == []


def test_ranges_found_over_all_tokens_are_left_alone() -> None:
    model = quantized(Gated(), dynamic=True)
    assert block_tokens(model) == []


@pytest.mark.usefixtures("blocks_of_64")
def test_a_layer_with_a_hook_is_called_as_a_whole() -> None:
    model = quantized(Gated())
    start_runtime(model)
    seen: list[int] = []
    handle = model["part"].up.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    model["part"](torch.randn(1, 300, WIDTH))
    assert seen == [300]
    handle.remove()
    stop_runtime(model)
    assert type(model["part"]) is Gated


@pytest.mark.parametrize("kind", [Tokenwise, Fused])
def test_a_module_of_another_class_is_not_pickled(kind: type[ClassPatch]) -> None:
    model = quantized(FeedForward(WIDTH, activation_fn="gelu-approximate"))
    own = set(vars(model["part"]))
    start_runtime(model)
    module = next(module for module in model.modules() if isinstance(module, kind))
    with pytest.raises(UnsupportedError, match="quantized models are not pickled"):
        pickle.dumps(module)
    assert type(copy.deepcopy(module)) is type(module)
    stop_runtime(model)
    assert set(vars(model["part"])) == own


@pytest.mark.usefixtures("blocks_of_64")
def test_hooks_between_the_layers_see_the_whole_tensor() -> None:
    model = quantized(FeedForward(WIDTH, activation_fn="gelu"))
    start_runtime(model)
    seen: list[int] = []
    between = model["part"].net[1]
    handle = between.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    model["part"](torch.randn(1, 300, WIDTH))
    assert seen == [300]
    handle.remove()
    stock = between.forward
    between.forward = lambda x: seen.append(x.shape[1]) or stock(x)
    model["part"](torch.randn(1, 300, WIDTH))
    assert seen == [300, 300]


@pytest.mark.usefixtures("blocks_of_64")
def test_a_copy_runs_its_own_layers_compiled_too() -> None:
    model = quantized(Gated())
    block_tokens(model)
    twin = copy.deepcopy(model)
    for layer in quantized_layers(twin).values():
        layer.release()
        layer.weight.data = layer.weight.data * 0
    x = torch.randn(1, 300, WIDTH)
    expected, nothing = model["part"](x), twin["part"](x)
    assert bool((expected != nothing).any())
    for one, wanted in ((model, expected), (twin, nothing)):
        assert torch.equal(torch.compile(one["part"], backend="aot_eager", fullgraph=True)(x), wanted)


class Stepping(nn.Module):
    """A denoiser whose feed-forward has scales per step."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.part(x)


@pytest.mark.usefixtures("blocks_of_64")
def test_one_graph_follows_the_steps() -> None:
    model = Stepping(quantized(Gated(), slots="per_step")["part"]).eval()
    start_clock(model, Clock([900.0, 100.0]), "timestep")
    assert block_tokens(model) == ["part"]
    x = torch.randn(1, 300, WIDTH)
    expected = [model(x, torch.tensor(time)) for time in (900.0, 100.0)]
    assert bool((expected[0] != expected[1]).any())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for time, wanted in zip((900.0, 100.0, 900.0), (*expected, expected[0]), strict=True):
            assert torch.equal(compiled(x, torch.tensor(time)), wanted)
