"""Which modules are a layer and an activation is found by trying; fused ones answer as before, and can be parted again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU, GELU, ApproximateGELU, SwiGLU
from torch import Tensor, nn

from reelquant.kernels import backend
from reelquant.nn import TensorLayout, start_runtime, stop_runtime
from reelquant.nn.around.attention import HOOKS
from reelquant.nn.around.fuse import Fused, Gated, fuse_activations
from tests.contracts.layers import INPUTS, one_code
from tests.single import build


def quantized(module: nn.Module, name: str, numbers: TensorLayout | None = INPUTS["int8"]) -> nn.Module:
    """The module with its linear layer quantized."""
    layer: Any = module.get_submodule(name)
    model = nn.ModuleDict({"layer": layer})
    inputs = None if numbers is None else {"format": numbers.format}
    built = build(model, ["layer"], [torch.randn(64, layer.in_features)], {"format": "int8", "granularity": "channel"}, inputs)
    setattr(module, name, built.layers["layer"])
    return module.eval()


class Activated(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(16, 24), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


class Named(nn.Module):
    """Its activation is a part called ``activation``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(16, 24), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x))


FUSIBLE = {
    "gelu": lambda: quantized(GELU(16, 24), "proj"),
    "gelu_tanh": lambda: quantized(GELU(16, 24, approximate="tanh"), "proj"),
    "silu": lambda: quantized(Activated(F.silu), "linear"),
    "relu": lambda: quantized(Activated(F.relu), "linear"),
    "part called activation": lambda: quantized(Named(), "linear"),
}
OTHERS = {
    "approximate gelu": lambda: quantized(ApproximateGELU(16, 24), "proj"),
    "gate of thirds": lambda: quantized(Activated(lambda y: y[:, :8] * F.silu(y[:, 8:16])), "linear"),
    "no activation": lambda: quantized(Activated(lambda y: y), "linear"),
    "float": lambda: Activated(F.silu),
    "something before": lambda: quantized(Activated(lambda y: F.silu(y) + 1), "linear"),
}


@pytest.mark.parametrize("name", FUSIBLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_modules_answer_as_before(name: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(FUSIBLE[name]()).to(dtype)
    x = torch.randn(5, 16).to(dtype)
    before, keys = model(x), set(model.state_dict())
    assert fuse_activations(model) == ["0"] and fuse_activations(model) == []
    assert set(model.state_dict()) == keys and type(model[0]).__name__.startswith("Fused")
    torch.testing.assert_close(model(x), before, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    torch._dynamo.reset()  # all fused modules share one forward, whose compilations are counted together
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))
    stop_runtime(model)
    assert not type(model[0]).__name__.startswith("Fused") and torch.equal(model(x), before)


GATED = {
    "gelu": lambda: quantized(GEGLU(16, 24), "proj"),
    "silu": lambda: quantized(SwiGLU(16, 24), "proj"),
    "first half": lambda: quantized(Activated(lambda y: F.gelu(y[:, :12], approximate="tanh") * y[:, 12:]), "linear"),
}


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gates_answer_as_before(name: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(GATED[name]()).to(dtype)
    x = 3 * torch.randn(700, 16).to(dtype)
    before, keys = model(x), set(model.state_dict())
    assert fuse_activations(model) == ["0"] and fuse_activations(model) == []
    assert isinstance(model[0], Gated) and set(model.state_dict()) == keys
    found = model(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, before, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps * float(before.abs().max()))
    with backend("reference"):
        assert torch.equal(model(x), before)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), before)  # compilers fuse by themselves
    stop_runtime(model)
    assert not isinstance(model[0], Gated) and torch.equal(model(x), before)


def test_gradients_pass_through_gates() -> None:
    model = nn.Sequential(GATED["gelu"]())
    x = torch.randn(5, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    fuse_activations(model)
    (found,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", OTHERS)
def test_other_modules_are_left_alone(name: str) -> None:
    assert fuse_activations(nn.Sequential(OTHERS[name]())) == []


def test_a_layer_that_an_adapter_wraps_is_computed_apart() -> None:
    model = nn.Sequential(FUSIBLE["gelu"]())
    fuse_activations(model)
    layer: Any = model[0].proj

    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return layer(x) + 1

    model[0].proj = Wrapped()
    x = torch.randn(5, 16)
    torch.testing.assert_close(model(x), F.gelu(layer(x) + 1))


def test_the_runtime_can_be_kept_out() -> None:
    model = nn.Sequential(FUSIBLE["gelu"]())
    with backend("reference"):
        start_runtime(model)
    assert HOOKS not in vars(model) and type(model[0]) is GELU
    start_runtime(model)
    start_runtime(model)
    assert HOOKS in vars(model) and isinstance(model[0], Fused)
    assert one_code(model[0].proj) > 0
    stop_runtime(model)
    assert HOOKS not in vars(model) and type(model[0]) is GELU


# --- attention inside and outside ---------------------------------------------------------------------------------------------------


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x[..., :64], x)


def test_attention_is_faster_inside_of_a_started_denoiser_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from reelquant.kernels.cpu import attention

    calls: list[Any] = []
    original = attention.attention
    monkeypatch.setattr(attention, "attention", lambda *args: calls.append(args) or original(*args))
    inside, outside = Attends(), Attends()
    start_runtime(inside)
    x = torch.randn(1, 1, 640, 64).bfloat16()
    if attention.refuses(x, x, x) is not None:
        pytest.skip(str(attention.refuses(x, x, x)))
    stock = outside(x)
    assert not calls
    fast = inside(x)
    assert len(calls) == 1 and not torch.equal(fast, stock)
    torch.testing.assert_close(fast.float(), stock.float(), rtol=0.1, atol=0.02)
    assert torch.equal(outside(x), stock) and len(calls) == 1
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), fast) and len(calls) == 2
    assert torch.equal(torch.compile(Attends(), fullgraph=True, backend="aot_eager")(x), stock) and len(calls) == 2
    with backend("reference"):
        assert torch.equal(inside(x), stock) and torch.equal(compiled(x), stock)
    with pytest.raises(RuntimeError):
        inside(torch.randn(1, 1, 640, 128).bfloat16())  # an error inside leaves nothing switched on
    assert torch.equal(outside(x), stock)
    stop_runtime(inside)
    assert torch.equal(inside(x), stock)
