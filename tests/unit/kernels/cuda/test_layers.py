"""Quantized layers through the Triton kernels against the reference, and the weights that kernels repack."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from reelquant.clock import Clock
from reelquant.kernels import KERNELS, Kernel, Reference, select
from reelquant.kernels.cuda import available, layers, refusals
from reelquant.nn import QuantLayer, TensorLayout, start_clock
from tests.contracts.layers import INPUTS, make, one_code
from tests.grids import sampled

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MORE = INPUTS | {
    "uint6": TensorLayout("uint6", "tensor"),
    "int6 token": TensorLayout("int6", "token", dynamic=True),
    "e4m3": TensorLayout("e4m3", "tensor"),
    "e4m3 token": TensorLayout("e4m3", "token", dynamic=True),
    "int6 sample": TensorLayout("int6", "sample", dynamic=True),
    "e4m3 sample": TensorLayout("e4m3", "sample", dynamic=True),
}
CASES: list[tuple[str, Any, str, str]] = [
    ("Linear", ("int8", "channel"), "int8", "triton int8"),
    ("Linear", ("int8", "tensor"), "uint8", "triton int8"),
    ("Linear without bias", ("int8", "channel"), "int8 token", "triton int8"),
    ("Linear", ("int6", "channel"), "int6", "triton int8"),
    ("Linear", ("int6", "channel"), "int6 token", "triton int8"),
    ("Linear", ("int4", "channel"), "uint6", "triton int8"),
    ("Linear", ("int4", "group-64"), "int8", "triton int8 from int4"),
    ("Linear", ("int4", "group-64"), "uint8", "triton int8 from int4"),
    ("Linear", ("int4", "group-64"), "uint6", "triton int8 from int4"),
    ("Linear", ("int4", "group-64"), "int8 token", "triton int8 from groups"),
    ("Linear", ("int4", "group-8"), "int8", "triton int8 from groups"),
    ("Linear", ("e4m3", "channel"), "e4m3", "triton e4m3"),
    ("Linear without bias", ("e4m3", "tensor"), "e4m3 token", "triton e4m3"),
    ("Conv2d", ("int8", "channel"), "int8", "triton int8 convolution"),
    ("Conv2d same", ("int8", "channel"), "uint8", "triton int8 convolution"),
    ("Conv2d strided", ("int8", "channel"), "uint8", "triton int8 convolution"),
    ("Conv3d", ("int8", "channel"), "int8", "triton int8 convolution"),
    ("Conv3d", ("int6", "channel"), "uint6", "triton int8 convolution"),
    ("Conv2d", ("int4", "group-8"), "uint8", "triton int8 from groups"),
    ("Conv2d", ("e4m3", "channel"), "e4m3", "triton e4m3 convolution"),
    ("Conv3d", ("e4m3", "channel"), "e4m3", "triton e4m3 convolution"),
    ("Conv2d", ("int8", "channel"), "int8 sample", "triton int8 convolution"),
    ("Conv2d strided", ("int8", "tensor"), "int8 sample", "triton int8 convolution"),
    ("Conv3d", ("int6", "channel"), "int6 sample", "triton int8 convolution"),
    ("Conv3d", ("int4", "group-8"), "int8 sample", "triton int8 from groups"),
    ("Conv2d same", ("e4m3", "channel"), "e4m3 sample", "triton e4m3 convolution"),
]
PLAIN: list[tuple[str, Any, str, str]] = [
    ("Linear", ("int8", "channel"), "uint8", "torch int8"),
    ("Linear", ("int6", "channel"), "int6", "torch int8"),
    ("Linear", ("e4m3", "channel"), "e4m3", "torch e4m3"),
    ("Linear without bias", ("e4m3", "tensor"), "e4m3 token", "torch e4m3"),
]


def kernel(name: str) -> Kernel:
    return next(one for one in KERNELS["cuda"]() if one.name == name)


def reach(layer: QuantLayer) -> float:
    """The most that the neighbouring code of an input moves an output; of floats those of the largest magnitude lie farthest apart."""
    if layer.layout.input is None or layer.layout.input.format != "e4m3":
        return one_code(layer)
    scale = getattr(layer, "input_scale", None)
    return (8 / 448 if scale is None else float(scale.max())) * 32 * float(layer.packed.dequantize().abs().max())


REWRITES: dict[str, dict[str, Any]] = {
    "plain": {},
    "affine": {"shift": True, "scale": True},
    "rotate": {"rotate": True},
    "mix": {"mix": ("scale", "rotate", "permute"), "scale": True},
}
GRID = [(*case, rewrite) for case in CASES + PLAIN for rewrite in REWRITES]


@pytest.mark.parametrize(("name", "weight", "numbers", "which", "rewritten"), sampled(GRID, 60))
def test_layers_compute_what_the_reference_computes(name: str, weight: Any, numbers: str, which: str, rewritten: str) -> None:
    rewrite, slots = REWRITES[rewritten], 1 if MORE[numbers].dynamic else 3
    layer, x = make(name, weight, MORE[numbers], slots=slots, **rewrite)
    layer, x = layer.to(DEVICE), x.to(DEVICE)
    operands = layer.operands
    if (name, weight, numbers, which) in CASES:
        assert select(operands, "cuda")[0].name == which
    assert kernel(which).declines(operands) is None
    built: Any = kernel(which).prepare(operands)
    if which == "triton int8 from groups":  # the product is exact; what folding moves is bounded in a test of its own
        operands = replace(operands, weight=layers.folded(operands.weight))
    oracle = Reference(operands)
    for slot in range(slots):
        expected = oracle(x, slot)
        found = built(x, torch.tensor(slot, device=DEVICE) if slot == 1 else slot)
        assert found.shape == expected.shape and found.dtype == expected.dtype
        error = (found - expected).abs()
        assert float(error.max()) <= 2 * reach(layer) + 1e-4 and float(error.median()) <= 1e-4
    if getattr(built, "codes", None):
        assert torch.equal(built.codes(), layer.codes)


def test_folding_moves_a_weight_by_half_of_a_code_at_most() -> None:
    for name in ("Linear", "Conv2d"):
        weight = make(name, ("int4", "group-8"), INPUTS["int8"])[0].packed
        exact, found = weight.dequantize(), layers.folded(weight).dequantize()
        limit = exact.flatten(1).abs().amax(1) / 127 / 2
        assert ((found - exact).flatten(1).abs() <= limit[:, None] * 1.001).all() and not torch.equal(found, exact)


@pytest.mark.parametrize(
    ("name", "weight", "numbers"), [("Linear", ("int6", "channel"), "uint6"), ("Conv2d", ("int8", "channel"), "uint6")]
)
def test_protected_steps_share_the_weight(name: str, weight: Any, numbers: str) -> None:
    layer, x = make(name, weight, MORE[numbers], slots=2, shift=True)
    operands = layer.to(DEVICE).operands
    built: Any = select(operands, "cuda")[0].prepare(operands)
    assert operands.input is not None
    given = replace(operands, input=operands.input.with_bits(8))
    finer = built.rounding(given)
    assert finer.weight is built.weight
    for slot in range(2):
        error = (finer(x.to(DEVICE), slot) - Reference(given)(x.to(DEVICE), slot)).abs()
        assert float(error.max()) <= one_code(layer) / 2 + 1e-4 and float(error.median()) <= 1e-4
        assert not torch.equal(finer(x.to(DEVICE), slot), built(x.to(DEVICE), slot))


def test_layers_that_read_one_tensor_share_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, DEVICE, KERNELS["cuda"])
    (query, x), (key, _) = (make("Linear", ("int8", "channel"), MORE["uint8"], slots=2) for _ in range(2))
    query, key, x, counted = query.to(DEVICE), key.to(DEVICE), x.to(DEVICE), []
    start_clock(nn.ModuleList([query, key]), Clock([900.0, 100.0]), "input")
    original = layers.cuda.quantize_static
    monkeypatch.setitem(vars(layers.cuda), "quantize_static", lambda *a, **k: counted.append(a) or original(*a, **k))
    with torch.no_grad():
        outputs = query(x), key(x)
        assert torch.equal(*outputs) and len(counted) == 1
        key.clock[0].tick(100.0)
        assert not torch.equal(key(x), outputs[1]) and len(counted) == 2  # another step, other codes
        before = key(x).clone()
        x += 1
        assert not torch.equal(key(x), before) and len(counted) == 3


@pytest.mark.skipif(DEVICE == "cuda", reason="writes through numpy, which counts no version")
def test_graphs_that_write_into_an_input_they_have_read_get_new_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Inductor does: into the same tensor, and its version does not tell."""
    monkeypatch.setitem(KERNELS, DEVICE, KERNELS["cuda"])
    (first, x), (second, _) = (make("Linear", ("int8", "channel"), MORE["int8 token"]) for _ in range(2))
    torch.ops.reelquant.layer(x, [], first.handle, "")
    version, other = x._version, torch.randn_like(x)
    x.numpy()[:] = other.numpy()
    assert x._version == version
    assert torch.equal(torch.ops.reelquant.layer(x, [], second.handle, ""), second(other))


@pytest.mark.parametrize(
    ("which", "numbers"),
    [("triton e4m3", "e4m3"), ("triton e4m3", "e4m3 token"), ("triton int8", "int8 token"), ("torch e4m3", "e4m3"), ("torch int8", "int8")],
)
def test_nan_shows_in_the_rows_that_read_it(which: str, numbers: str) -> None:
    """Everywhere, where torch rounds to int8; static int8 codes of Triton are not looked at (docs/kernels.md)."""
    layer, x = make("Linear", (numbers.split()[0], "channel"), MORE[numbers])
    built: Any = kernel(which).prepare(layer.to(DEVICE).operands)
    x[1, 2, 3] = torch.nan
    found = built(x.to(DEVICE), 0)
    assert found[1, 2].isnan().all() and (which == "torch int8" or found.isnan().sum() == found.shape[-1])


@pytest.mark.parametrize("weight", [("int8", "channel"), ("int4", "group-64"), ("e4m3", "tensor"), ("e4m3", "channel")], ids="-".join)
def test_weight_only_layers(weight: Any) -> None:
    layer, x = make("Linear", weight, None)
    layer, x = layer.to(DEVICE), x.to(DEVICE).bfloat16()
    assert refusals.refuses_float(layer.operands) is None
    built = layers.FloatLinear(layer.operands)
    torch.testing.assert_close(built(x, 0), Reference(layer.operands)(x, 0), rtol=2e-2, atol=2e-2)
    if weight[0] == "int4":
        assert built.codes is not None and torch.equal(built.codes(), layer.codes)


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d same", "Conv3d", "Linear"])
@pytest.mark.parametrize("rewrite", [{}, {"shift": True, "scale": True}], ids=["", "affine"])
def test_float_inputs_of_other_layers_are_multiplied_in_their_own_dtype(name: str, rewrite: dict[str, bool]) -> None:
    layer, x = make(name, ("int6", "channel"), None, **rewrite)
    operands, x = layer.to(DEVICE).operands, x.to(DEVICE).bfloat16()
    found, refused = select(operands, "cuda")
    assert found.name == "torch float products" and set(refused) == {one.name for one in KERNELS["cuda"]()} - {found.name}
    torch.testing.assert_close(found.prepare(operands)(x, 0), Reference(operands)(x, 0), rtol=2e-2, atol=2e-2)


def test_what_they_do_not_take_is_said() -> None:
    def refusal(name: str, weight: Any, numbers: str, which: str) -> str:
        return str(kernel(which).declines(make(name, weight, MORE[numbers])[0].operands))

    int8, grouped, e4m3 = ("int8", "channel"), ("int4", "group-64"), ("e4m3", "channel")
    cases = [
        ("Linear", int8, "float", "triton int8", "the input stays float"),
        ("Linear", ("uint3", "channel"), "int8", "triton int8", "weights are uint3"),
        ("Linear", int8, "e4m3", "triton int8", "inputs are e4m3, not integers"),
        ("Conv2d", int8, "int8", "triton int8", "a convolution"),
        ("Linear", grouped, "int8 token", "triton int8 from int4", "static inputs"),
        ("Linear", ("int4", "group-8"), "int8", "triton int8 from int4", "groups of 64, 128"),
        ("Conv1d", int8, "int8", "triton int8 convolution", "two or three axes"),
        ("Linear", int8, "int8", "triton float products", "it does not take rounded inputs"),
        ("Linear", int8, "e4m3", "triton e4m3", "weights are int8, not e4m3"),
        ("Linear", e4m3, "int8", "triton e4m3", "inputs are int8, not e4m3"),
        ("Linear", int8, "int8", "torch float products", "it does not take rounded inputs"),
    ]
    for *given, words in cases:
        assert words in refusal(*given), given
    wide = replace(make("Linear", int8, INPUTS["int8"])[0].operands)
    wide = replace(wide, weight=replace(wide.weight, shape=(70, refusals.DEEPEST + 1)))
    assert refusals.refuses_linear(wide) == "65536 products per output, more than 65535"


def test_float8_is_refused_where_the_chip_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = make("Linear", ("e4m3", "channel"), MORE["e4m3"])[0].operands
    monkeypatch.setattr(layers.cuda, "float8", lambda: "e4m3 needs compute capability 8.9, the GPU has 8.0")
    found, refused = select(operands, "cuda")
    assert found.name == "reference" and "8.9" in refused["triton e4m3"] and "8.9" in refused["torch e4m3"]
