"""Quantized layers against an independent computation from their stored tensors, for every format, granularity and input stage."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelquant._errors import CheckpointError, UnsupportedError
from reelquant.clock import Clock
from reelquant.engine.quality import layer_bytes
from reelquant.formats import FORMATS, SCALES, parse_format
from reelquant.kernels import backend, hadamard
from reelquant.nn import QuantConv1d, QuantConv2d, QuantConv3d, QuantLayer, QuantLinear, buffer_shapes, quantized_class, start_clock
from reelquant.nn.spec import LayerLayout, TensorLayout
from tests.grids import sampled
from tests.single import build, unrounded

KINDS: dict[str, tuple[type[nn.Module], Any, tuple[int, ...]]] = {
    "Linear": (QuantLinear, lambda: nn.Linear(10, 7), (2, 5, 10)),
    "Linear without bias": (QuantLinear, lambda: nn.Linear(10, 7, bias=False), (4, 10)),
    "Conv1d": (QuantConv1d, lambda: nn.Conv1d(6, 5, 3, padding=1, dilation=2), (2, 6, 9)),
    "Conv2d": (QuantConv2d, lambda: nn.Conv2d(6, 5, 3, stride=2, padding=(1, 2)), (4, 6, 6, 7)),
    "Conv2d same": (QuantConv2d, lambda: nn.Conv2d(6, 5, (2, 3), padding="same", bias=False), (2, 6, 5, 5)),
    "Conv3d": (QuantConv3d, lambda: nn.Conv3d(4, 5, (3, 1, 2), padding=(1, 0, 1)), (2, 4, 4, 3, 3)),
}
SHIFTED = [{"transform": "shift"}, {"transform": "range_integrate", "power": 0.5}]
ROTATED = [{"transform": "rotate", "least": -100.0}, *SHIFTED]
MIXED = [
    {"transform": "scale"},
    {"transform": "rotate", "always": True, "signs": True, "block": 2},
    {"transform": "permute", "clusters": 2},
    *SHIFTED,
]
REWRITES: dict[str, list[dict[str, Any]]] = {"plain": [], "shifted": SHIFTED, "rotated": ROTATED, "mixed": MIXED}
DESIGN_NAMES = {  # docs/design.md, section 8
    "weight", "bias", "weight_scale", "weight_scale_2", "weight_zero_point", "weight_levels",
    "input_scale", "input_zero_point", "input_levels",
    "pre_quant_shift", "pre_quant_scale", "output_table", "pre_quant_mix_0", "pre_quant_mix_2",
}  # fmt: skip


@pytest.fixture(autouse=True)
def oracle() -> Iterator[None]:
    """The reference computes here; test_kernels.py holds the fast kernels against it."""
    with backend("reference"):
        yield


@torch.no_grad()
def make(
    kind: str, weight: Any, input: Any = None, steps: Any = (), *, frames: int = 1, calls: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, QuantLayer, list[Tensor]]:
    """The float layer, its replacement, and the inputs it was calibrated on: skewed channels, a larger range at every call."""
    module = KINDS[kind][1]().to(dtype).eval()
    shape = KINDS[kind][2]
    axis = 1 if "Conv" in kind else -1
    seen = []
    for call in range(calls):
        x = torch.randn(shape).movedim(axis, -1)
        x = x * (0.5 + torch.arange(x.shape[-1]) % 3) * (call + 1) + torch.linspace(-2, 3, x.shape[-1])
        seen.append(x.movedim(-1, axis).contiguous().to(dtype))
    model = nn.ModuleDict({"layer": module})
    built = build(model, ["layer"], seen, weight, input, steps, frames=frames)
    return module, built.layers["layer"], seen


# --- an independent computation in float64 --------------------------------------------------------------------------------------


def bits_of(rows: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes from bytes: a little-endian stream of bits per row."""
    stream = np.unpackbits(rows.view(np.uint8), axis=1, bitorder="little")[:, : count * bits].reshape(len(rows), count, bits)
    return (stream.astype(np.int64) << np.arange(bits)).sum(-1)


def levels_of(name: str, table: Tensor | None) -> Tensor:
    return table.double() if table is not None else parse_format(name).decode(torch.arange(2 ** parse_format(name).bits)).double()


def float_weight(layer: QuantLayer) -> Tensor:
    """``[out, in, *kernel]`` from the tensors of the state dict."""
    state, layout = layer.state_dict(), layer.layout.weight
    shape = (
        (layer.out_features, layer.in_features)
        if isinstance(layer, nn.Linear)
        else (layer.out_channels, layer.in_channels, *layer.kernel_size)
    )
    bits, width = parse_format(layout.format).bits, int(np.prod(shape[1:]))
    stored = state["weight"].numpy()
    codes = stored.astype(np.int64) + 128 if stored.dtype == np.int8 else bits_of(stored, bits, width)
    units = torch.from_numpy(codes)
    if layout.format.startswith("uint"):
        values = units.double()
    elif layout.format.startswith("int"):
        values = units.double() - 2 ** (bits - 1)
    else:
        values = levels_of(layout.format, state.get("weight_levels"))[units]
    size = int(layout.granularity.partition("-")[2] or width)
    owner = torch.arange(shape[0])[:, None] * -(-width // size) + torch.arange(width) // size
    owner = torch.zeros_like(owner) if layout.granularity == "tensor" else owner
    zero = state["weight_zero_point"].double()[owner] if "weight_zero_point" in state else 0
    return ((values - zero) * scales_of(layer)[owner]).reshape(shape)


def scales_of(layer: QuantLayer) -> Tensor:
    """Scales of a weight, float64; those of eight bits as torch reads the bytes."""
    state, kind = layer.state_dict(), layer.layout.weight.scale
    stored = state["weight_scale"]
    if kind == "e4m3":
        return stored.view(torch.float8_e4m3fn).double() * state["weight_scale_2"].double()
    return stored.view(torch.float8_e8m0fnu).double() if kind == "e8m0" else stored.double()


def along(values: Tensor, grain: str, x: Tensor, axis: int) -> Tensor:
    """Scales ``[units]`` in a shape that broadcasts against ``x``."""
    if grain == "channel":
        return values.view([-1 if d == axis % x.ndim else 1 for d in range(x.ndim)])
    if grain.startswith("frame"):
        return values.repeat(x.shape[0] // len(values)).view(-1, *[1] * (x.ndim - 1))
    return values.view([1] * x.ndim)


def rounded(x: Tensor, name: str, table: Tensor | None, scale: Tensor, zero: Tensor | float) -> Tensor:
    unit = x / scale
    if name.startswith(("int", "uint")):
        bits, low = parse_format(name).bits, -(2 ** (parse_format(name).bits - 1)) if name.startswith("int") else 0
        return ((unit + zero).round().clamp(low, low + 2**bits - 1) - zero) * scale
    levels = levels_of(name, table).unique()
    return levels[(unit[..., None] - levels).abs().argmin(-1)].float() * scale


def expected_output(module: nn.Module, layer: QuantLayer, x: Tensor, slot: int = 0) -> Tensor:
    state, layout = layer.state_dict(), layer.layout.input
    axis = -1 if isinstance(layer, nn.Linear) else 1
    x = x.float()  # the input stage in float32, as specified: in float64 a value on a rounding border may go the other way
    if not isinstance(module, nn.Linear):
        widths = module._reversed_padding_repeated_twice
        x = F.pad(x, list(widths))
    for place, name in enumerate(layer.layout.mix):
        x = mixed(x, name, state.get(f"pre_quant_mix_{place}"), axis)
    if layer.layout.rotate:  # with the same additions: another order would move values over rounding borders
        x = hadamard(x, axis)
    if "pre_quant_shift" in state:
        x = x - along(state["pre_quant_shift"].float(), "channel", x, axis)
    if "pre_quant_scale" in state:
        x = x / along(state["pre_quant_scale"].float(), "channel", x, axis)
    if layout is not None and layout.dynamic:
        x = in_groups(x, layout, axis) if "group" in layout.granularity else dynamically(x, layout.format, layout.granularity)
    elif layout is not None:
        scale = along(state["input_scale"][slot], layout.granularity, x, axis)
        zero = along(state["input_zero_point"][slot], layout.granularity, x, axis) if "input_zero_point" in state else 0.0
        x = rounded(x, layout.format, state.get("input_levels"), scale, zero)
    bias = state["bias"].double() if "bias" in state else None
    if isinstance(module, nn.Linear):
        return F.linear(x.double(), float_weight(layer), bias)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.ndim - 2]
    return convolve(x.double(), float_weight(layer), bias, stride=module.stride, dilation=module.dilation)


def mixed(x: Tensor, name: str, vector: Tensor | None, axis: int) -> Tensor:
    """One operation on channels; a rotation with the additions of the layer, for values on rounding borders."""
    if name == "scale":
        assert vector is not None
        return x / along(vector.float(), "channel", x, axis)
    if name == "permute":
        assert vector is not None
        return torch.stack([x.select(axis, int(channel)) for channel in vector], axis)
    size = int(name.partition("-")[2] or 0) or x.shape[axis] & -x.shape[axis]
    return torch.cat([hadamard(part, axis) for part in x.split(size, axis)], axis)


def dynamically(x: Tensor, name: str, grain: str) -> Tensor:
    """int8 or uint8 with the range of this tensor, or of each token of a linear layer."""
    over = tuple(range(x.ndim)) if grain == "tensor" else (-1,)
    low, high = x.amin(over, keepdim=True).clamp(max=0), x.amax(over, keepdim=True).clamp(min=0)
    if name == "uint8":
        scale = (high - low) / 255
        return rounded(x, name, None, scale, (-low / scale).round())
    return rounded(x, name, None, torch.maximum(high / 127, low / -128), 0.0)


def in_groups(x: Tensor, layout: TensorLayout, axis: int) -> Tensor:
    """Groups of channels at every position, with scales of the largest magnitude as the three formats define them."""
    size, fmt = int(layout.granularity.partition("-")[2]), parse_format(layout.format)
    moved = x.movedim(axis, -1)
    size = min(size, moved.shape[-1])
    groups = F.pad(moved, (0, -moved.shape[-1] % size)).unflatten(-1, (-1, size))
    high, low = groups.amax(-1, keepdim=True).clamp(min=0), groups.amin(-1, keepdim=True).clamp(max=0)
    wanted = torch.maximum(high / fmt.high, low / fmt.low)
    if layout.scale == "e4m3":
        whole = wanted.amax() / 448
        scale = (wanted / whole).to(torch.float8_e4m3fn).float() * whole
    elif layout.scale == "e8m0":
        scale = torch.exp2(torch.maximum(high, -low).log2().floor() - np.floor(np.log2(fmt.high)))
    else:
        scale = wanted.bfloat16().float()
    scale = torch.where(scale > 0, scale, 1.0)  # of zeros, as a border is
    return rounded(groups, layout.format, None, scale, 0.0).flatten(-2)[..., : moved.shape[-1]].movedim(-1, axis)


def close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """1e-5 of the largest output: float32 sums of a few dozen terms."""
    assert found.shape == expected.shape
    assert float((found.double() - expected).abs().amax()) <= relative * float(expected.abs().amax())


# --- numbers --------------------------------------------------------------------------------------------------------------------

WEIGHTS = list(itertools.product([name for name in FORMATS if name != "log2_8"], ["channel"])) + list(
    itertools.product(["int8", "int4", "int3", "uint5", "uint8", "e4m3", "e2m1", "log2_4", "power_8"], ["tensor", "group-5", "group-64"])
)


@pytest.mark.parametrize(("fmt", "grain"), WEIGHTS)
def test_weight_only_layers_compute_with_the_stored_weight(fmt: str, grain: str) -> None:
    for kind in ("Linear", "Conv2d"):
        module, layer, (x,) = make(kind, {"format": fmt, "granularity": grain})
        close(layer(x), expected_output(module, layer, x))
        stored = float_weight(layer)
        torch.testing.assert_close(layer.dequantized_weight().double(), stored, rtol=1e-6, atol=1e-12)


SYMMETRIC = [name for name in FORMATS if not parse_format(name).needs_zero_point]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("fmt", SYMMETRIC)
def test_weights_with_scales_of_eight_bits_are_what_is_stored(fmt: str, scale: str) -> None:
    for kind in ("Linear", "Conv2d"):
        module, layer, (x,) = make(kind, {"format": fmt, "granularity": "group-4", "scale": scale})
        assert layer.weight_scale.dtype == torch.uint8 and layer.layout.features == layer.features - {"window"} == {"scale_codes"}
        close(layer(x), expected_output(module, layer, x))
        torch.testing.assert_close(layer.dequantized_weight().double(), float_weight(layer), rtol=1e-6, atol=1e-12)
        empty = quantized_class(module).like(module, LayerLayout.from_json(layer.layout.to_json()))
        empty.load_state_dict(layer.state_dict())
        assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("steps", [(), SHIFTED, ROTATED, MIXED], ids=["plain", "shifted", "rotated", "mixed"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", KINDS)
def test_the_dequantized_layer_is_the_float_layer_but_for_rounding(kind: str, steps: Any) -> None:
    module, layer, (x,) = make(kind, {"format": "int8", "granularity": "channel"}, None, steps)
    float_layer = copy.deepcopy(module)
    with torch.no_grad():
        float_layer.weight.copy_(layer.dequantized_weight())
        if (bias := layer.float_bias()) is not None:
            float_layer.bias = nn.Parameter(bias.float())
        close(float_layer(x), layer(x).double(), 1e-3 if layer.bias is not None and layer.bias.dtype == torch.float16 else 1e-5)
        # half a step of 127 per weight, over some tens of weights
        close(float_layer(x), module(x).double(), 0.02)


@pytest.mark.parametrize("unused", [False, True])
def test_a_model_may_write_into_the_answer_of_a_table(unused: bool) -> None:
    layer = QuantLinear(3, 4, True, LayerLayout(TensorLayout("int8", "channel"), table=2, unused=unused))
    stored = torch.zeros(2, 4) if unused else torch.arange(8.0).view(2, 4)
    if not unused:
        layer.output_table = stored.clone()
    layer.clock = (Clock([900.0, 100.0]),)
    layer.clock[0].tick(100)
    for rows in (1, 2):
        answer = layer(torch.randn(rows, 3))
        assert torch.equal(answer, stored[1:].expand(rows, 4))
        answer += 1
        assert torch.equal(layer(torch.randn(rows, 3)), stored[1:].expand(rows, 4))


INPUTS: dict[str, tuple[dict[str, Any], int, int]] = {  # recipe, frames, calls
    "int8 tensor": ({"format": "int8"}, 1, 1),
    "uint8 tensor": ({"format": "uint8"}, 1, 1),
    "uint6 channel": ({"format": "uint6", "granularity": "channel"}, 1, 1),
    "int8 frame": ({"format": "int8", "granularity": "frame-2"}, 2, 1),
    "e4m3 tensor": ({"format": "e4m3"}, 1, 1),
    "mse": ({"format": "int6", "range": {"name": "mse", "p": 2.4, "candidates": 9}}, 1, 1),
    "percentile": ({"format": "uint8", "range": {"name": "percentile", "percentile": 0.9}}, 1, 1),
    "one of three": (
        {"format": ["uint4", "log_uniform_4", "power_4"], "range": {"name": "criterion", "score": "nmse", "candidates": 5}},
        1,
        1,
    ),
    "per step": ({"format": "uint8", "slots": "per_step"}, 1, 3),
    "per step and channel": ({"format": "int8", "granularity": "channel", "slots": "per_step"}, 1, 3),
    "dynamic tensor": ({"format": "uint8", "dynamic": True}, 1, 1),
    "dynamic symmetric": ({"format": "int8", "dynamic": True}, 1, 1),
    "groups": ({"format": "int4", "granularity": "group-4", "dynamic": True}, 1, 1),
    "groups of e4m3 scales": ({"format": "e2m1", "granularity": "group-4", "scale": "e4m3", "dynamic": True}, 1, 1),
    "groups of e8m0 scales": ({"format": "e4m3", "granularity": "group-3", "scale": "e8m0", "dynamic": True}, 1, 1),
}


PER_TENSOR = {name for name, (recipe, _, _) in INPUTS.items() if recipe.get("dynamic") or not {"slots", "granularity"} & recipe.keys()}
CASES = [case for case in itertools.product(KINDS, INPUTS, REWRITES) if case[1] in PER_TENSOR or case[2] != "mixed"]


@pytest.mark.parametrize(("kind", "name", "rewrite"), sampled(CASES, 110))
def test_inputs_are_padded_shifted_and_rounded_like_this(kind: str, name: str, rewrite: str) -> None:
    recipe, frames, calls = INPUTS[name]
    steps = REWRITES[rewrite]
    module, layer, seen = make(kind, {"format": "int8", "granularity": "channel"}, recipe, steps, frames=frames, calls=calls)
    clock = Clock([900.0, 500.0, 100.0][:calls])
    layer.clock = (clock,)
    assert layer.layout.slots == calls and layer.layout.rotate == (steps is ROTATED)
    for slot, timestep in enumerate(clock.timesteps.tolist()):
        clock.tick(timestep)
        for x in seen:
            close(layer(x), expected_output(module, layer, x, slot))
    if calls > 1:  # the slots differ, or this test could not tell them apart
        assert float((expected_output(module, layer, seen[-1], 0) - expected_output(module, layer, seen[-1], 2)).abs().amax()) > 1e-3


def test_dynamic_tokens_have_scales_of_their_own() -> None:
    module, layer, (x,) = make(
        "Linear", {"format": "int8", "granularity": "channel"}, {"format": "uint8", "granularity": "token", "dynamic": True}
    )
    x = x * torch.tensor([1.0, 10.0, 100.0, 1e3, 1e-3])[:, None]
    close(layer(x), expected_output(module, layer, x))


def test_a_shifted_convolution_is_exact_up_to_the_border() -> None:
    """8 bit are not the point here: with float inputs the shift must cancel in every pixel, against the same layer without it."""
    module = nn.Conv2d(4, 3, 3, padding=2, dilation=2)
    x = torch.randn(2, 4, 6, 6) + torch.tensor([50.0, -20.0, 0.0, 3.0])[:, None, None]
    model = nn.ModuleDict({"layer": module})
    weight = {"format": "int8", "granularity": "channel"}
    plain = build(model, ["layer"], [x], weight).layers["layer"](x)
    shifted = unrounded(build(model, ["layer"], [x], weight, {"format": "int8"}, [{"transform": "shift"}])).layers["layer"]
    assert float(shifted.pre_quant_shift.abs().amax()) > 20
    # a shift does not touch the codes, so both are the same function: float32 sums of 36 terms of size 50
    torch.testing.assert_close(shifted(x), plain, rtol=0, atol=36 * 50 * 2**-23)


@torch.no_grad()
def test_bias_correction_makes_the_mean_output_exact() -> None:
    x = torch.randn(200, 10) + 7
    model = nn.ModuleDict({"layer": nn.Linear(10, 6)})
    for steps in ([], [{"transform": "shift"}]):
        plain, corrected = (
            build(
                model, ["layer"], [x], {"format": "int3", "granularity": "channel"}, None, [*steps, {"solve": "gptq", "correct_bias": on}]
            )
            for on in (False, True)
        )
        mean = model["layer"](x).mean(0)
        torch.testing.assert_close(corrected.layers["layer"](x).mean(0), mean, rtol=0, atol=1e-4)  # float32 sums of 7s
        assert float((plain.layers["layer"](x).mean(0) - mean).abs().amax()) > 1e-2


# --- storage --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fmt", "grain", "bits"), [("int8", "channel", 8), ("int4", "group-64", 4), ("int3", "group-8", 3), ("uint5", "channel", 5)]
)
def test_bytes_are_exactly_those_of_the_layout(kind: str, fmt: str, grain: str, bits: int) -> None:
    module, layer, _ = make(kind, {"format": fmt, "granularity": grain}, {"format": "uint8"}, SHIFTED)
    out, width = module.weight.shape[0], module.weight[0].numel()
    channels = module.weight.shape[1]
    size = int(grain.partition("-")[2] or width)
    scales = out * -(-width // size)
    by_hand = (
        out * -(-width * bits // 8)  # packed codes
        + scales * 2  # bfloat16
        + (scales if fmt.startswith("u") else 0)  # one byte per zero point
        + out * layer.bias.element_size()  # a shift makes a bias where there was none
        + 4 + 4  # input scale and zero point
        + channels * (2 + 2)  # shift and scale, bfloat16
    )  # fmt: skip
    assert layer_bytes(layer) == by_hand
    assert not any(p.is_floating_point() and p.shape == module.weight.shape for p in [*layer.parameters(), *layer.buffers()])


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("fmt", ["int8", "uint4", "power_4", "e4m3"])
def test_tensors_are_those_the_layout_announces(name: str, fmt: str) -> None:
    recipe, frames, calls = INPUTS[name]
    module, layer, _ = make("Conv2d", {"format": fmt, "granularity": "channel"}, recipe, SHIFTED, frames=frames, calls=calls)
    announced = buffer_shapes(tuple(module.weight.shape), layer.layout, module.in_channels)
    assert {key: (tuple(value.shape), value.dtype) for key, value in layer.named_buffers()} == announced
    assert set(layer.state_dict()) == {"weight", "bias", *announced} <= DESIGN_NAMES
    empty = quantized_class(module).like(module, layer.layout)
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(4, 6, 6, 7)
    empty.clock = layer.clock = (Clock([0.0] * calls),)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_operations_on_channels_are_stored_and_read_back(kind: str) -> None:
    numbers = {"format": "int4", "granularity": "group-4", "dynamic": True}
    module, layer, (x,) = make(kind, {"format": "int8", "granularity": "channel"}, numbers, MIXED)
    described = json.loads(json.dumps(layer.layout.to_json()))
    assert described["mix"] == [*layer.layout.mix] and layer.layout.mix[0] == "scale" and "mix" in layer.features
    announced = buffer_shapes(tuple(module.weight.shape), layer.layout, layer._channels())
    assert {key: (tuple(value.shape), value.dtype) for key, value in layer.named_buffers()} == announced
    assert set(announced) <= DESIGN_NAMES
    empty = quantized_class(module).like(module, LayerLayout.from_json(described))
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("name", ["rotate-3", "rotate-16", "turn", "permute-4"])
def test_operations_that_this_version_does_not_know_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"mixes channels by|rotates 10 channels in blocks of"):
        QuantLinear(10, 4, True, LayerLayout(TensorLayout("int8", "channel"), mix=(name,)))


def test_tensor_names_of_an_affine_layer() -> None:
    _, layer, _ = make("Linear without bias", {"format": "uint8", "granularity": "channel"}, {"format": "uint8"}, SHIFTED)
    assert set(layer.state_dict()) == {
        "weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point", "pre_quant_shift", "pre_quant_scale", "bias",
    }  # fmt: skip


# --- behaviour as a module ------------------------------------------------------------------------------------------------------

W8A8 = ({"format": "int8", "granularity": "channel"}, {"format": "uint8"})


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_stock_layer_and_takes_the_keyword(kind: str) -> None:
    module, layer, (x,) = make(kind, *W8A8, SHIFTED)
    assert type(layer) is KINDS[kind][0] and isinstance(layer, type(module))
    assert torch.equal(layer(input=x), layer(x))
    for name in ("in_features", "out_features", "in_channels", "kernel_size", "stride", "padding", "dilation"):
        assert getattr(layer, name, None) == getattr(module, name, None)
    assert not any(p.requires_grad for p in layer.parameters())
    assert "uint8" in repr(layer) and layer.kernel.name == "reference" and layer.simulated


@pytest.mark.parametrize("kind", KINDS)
def test_empty_small_and_non_contiguous_inputs(kind: str) -> None:
    _, layer, (x,) = make(kind, *W8A8, SHIFTED)
    axis = 1 if "Conv" in kind else -1
    assert layer(x[:0]).shape == (0, *layer(x).shape[1:])
    torch.testing.assert_close(layer(x[:1]), layer(x)[:1], rtol=1e-5, atol=1e-5)  # another batch, another order of summation
    strided = x.movedim(axis, 0).contiguous().movedim(0, axis)
    assert not strided.is_contiguous() or strided.ndim < 2
    torch.testing.assert_close(layer(strided), layer(x), rtol=1e-5, atol=1e-5)
    sparse = torch.stack([x, x], -1)[..., 0]
    torch.testing.assert_close(layer(sparse), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grain", ["channel", "group-4", "tensor"])
def test_layers_of_one_row_and_one_column(grain: str) -> None:
    for rows, columns in ((1, 5), (5, 1), (1, 1)):
        model = nn.ModuleDict({"layer": nn.Linear(columns, rows)})
        x = torch.randn(4, columns)
        for steps in ([], SHIFTED, [{"solve": "gptq", "correct_bias": True}]):
            layer = build(model, ["layer"], [x], {"format": "int8", "granularity": grain}, {"format": "uint8"}, steps).layers["layer"]
            close(layer(x), expected_output(model["layer"], layer, x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_computed_in_float32_and_come_back_as_they_were(kind: str, dtype: torch.dtype) -> None:
    module, layer, (x,) = make(kind, *W8A8, SHIFTED, dtype=dtype)
    found = layer(x)
    assert found.dtype == dtype
    expected = expected_output(module, layer, x)  # from the very same half-precision input: only the last rounding differs
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5 * float(expected.abs().amax()))


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu", torch.float16)]
)
def test_a_cast_of_the_model_leaves_scales_codes_and_timesteps_alone(cast: Any) -> None:
    _, layer, (x,) = make("Conv2d", {"format": "power_4", "granularity": "channel"}, {"format": "uint8"}, SHIFTED)
    model = nn.ModuleDict({"layer": layer})
    model.forward = lambda x, timestep: model["layer"](x)  # type: ignore[method-assign]
    start_clock(model, Clock([999.0, 501.5]), "timestep")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    reference = layer(x)
    cast(model)
    for name, value in layer.state_dict().items():
        if name != "bias":
            assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    assert layer.bias.dtype != torch.float32  # like that of a float layer
    assert layer.clock[0].timesteps.tolist() == [999.0, 501.5]
    # only the bias was rounded: half an eps of bfloat16 at most
    torch.testing.assert_close(layer(x), reference, rtol=0, atol=2**-8 * float(before["bias"].abs().amax()))


def test_a_copy_follows_the_clock_of_the_copied_denoiser() -> None:
    class Denoiser(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.layer(x)

    module, layer, seen = make("Linear", W8A8[0], {"format": "uint8", "slots": "per_step"}, calls=3)
    model = Denoiser(layer)
    start_clock(model, Clock([900.0, 500.0, 100.0]), "timestep")
    twin = copy.deepcopy(model)
    assert twin.layer.clock[0] is twin.reelquant_clock is not model.reelquant_clock
    x = seen[2]
    first, last = (expected_output(module, layer, x, slot) for slot in (0, 2))
    model(x, torch.tensor(900.0))
    close(twin(x, torch.tensor(100.0)), last)
    close(layer(x), first)  # the original's clock still stands where its own call left it
    close(model(x, torch.tensor(900.0)), first)


def test_per_step_scales_without_a_clock_are_an_error() -> None:
    _, layer, seen = make("Linear", W8A8[0], {"format": "uint8", "slots": "per_step"}, calls=3)
    with pytest.raises(UnsupportedError, match="clock"):
        layer(seen[0])


def test_subclasses_with_a_forward_of_their_own_stay_float() -> None:
    class Odd(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    class Same(nn.Linear):
        pass

    assert quantized_class(Odd(3, 3)) is None
    assert quantized_class(Same(3, 3)) is QuantLinear
    assert quantized_class(nn.LayerNorm(3)) is None
    _, layer, _ = make("Linear", *W8A8)
    assert quantized_class(layer) is None  # quantized already


@pytest.mark.parametrize("name", ["per step", "int8 tensor", "uint6 channel", "dynamic tensor", "groups"])
@torch.no_grad()
def test_the_reported_error_is_that_of_the_layer_at_every_step(name: str) -> None:
    recipe, _, calls = INPUTS[name]
    module = nn.Linear(10, 7)
    seen = [torch.randn(40, 10) * (call + 1) ** 2 + torch.linspace(-2, 3, 10) for call in range(calls)]
    built = build(nn.ModuleDict({"layer": module}), ["layer"], seen, {"format": "int8", "granularity": "channel"}, recipe)
    layer, clock = built.layers["layer"], Clock([900.0, 500.0, 100.0][:calls])
    layer.clock = (clock,)
    found = []
    for timestep, x in zip(clock.timesteps.tolist(), seen, strict=True):
        clock.tick(timestep)
        found.append(layer(x))
    expected = torch.cat([module(x) for x in seen])
    error = float((torch.cat(found) - expected).square().mean() / expected.var(correction=0))
    assert built.records[0].error == pytest.approx(error, rel=1e-3)
    assert error > 1e-6  # 8 bits leave a trace: an error of zero would mean that the inputs were not rounded at all


def test_an_error_that_rows_cannot_tell_is_left_out() -> None:
    recipe, frames, _ = INPUTS["int8 frame"]
    x = torch.randn(4, 9, 10)
    weight = {"format": "int8", "granularity": "channel"}
    built = build(nn.ModuleDict({"layer": nn.Linear(10, 7)}), ["layer"], [x], weight, recipe, frames=frames)
    assert built.records[0].error is None and built.records[0].coverage is None
