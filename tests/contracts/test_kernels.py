"""Every fast kernel against the reference, for every layer it takes, within the bound it states; and what it does to a layer's weight."""

from __future__ import annotations

import copy
import itertools
import math
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelquant._errors import RecipeError
from reelquant.clock import Clock
from reelquant.formats import fit, pack
from reelquant.kernels import KERNELS, Kernel, Reference, backend, current_backend, select
from reelquant.kernels.activations import ACTIVATIONS
from reelquant.kernels.cpu import (
    amx_tile,
    attention,
    attention_bfloat16,
    attention_fixed,
    int8,
    int8_quads,
    int8_tiles,
    int16_madd,
    loops,
    nibbles,
    quad_tile,
    row_product,
)
from reelquant.kernels.cpu import inputs as inputs_module
from reelquant.kernels.cpu.inputs import Inputs
from reelquant.nn import LayerLayout, LayerTensors, QuantLayer, TensorLayout, quantized_class, start_clock
from tests.contracts.layers import INPUTS, LAYERS, REWRITES, WEIGHTS, make, one_code, oracle
from tests.grids import sampled

vnni = pytest.mark.skipif(int8.available() is not None, reason=str(int8.available()))
integers = pytest.mark.skipif(None not in (int8.available(), int16_madd.available()), reason=str(int16_madd.available()))
amx = pytest.mark.skipif(int8_tiles.available() is not None, reason=str(int8_tiles.available()))
FOLDED = {"onednn int8 from int4": 64, "int16 pairs": 64}
"""Kernels that fold the scales of 4-bit groups into integers, and which part of an output that may move at most."""


GRID = [
    case
    for case in itertools.product(LAYERS, WEIGHTS, INPUTS, REWRITES)
    if ("sample" if "Linear" in case[0] else "token") not in case[2]  # linear layers have tokens, convolutions samples
]


@pytest.mark.parametrize(
    ("name", "weight", "numbers", "rewrite"), sampled(GRID, 120), ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_fast_kernels_compute_what_the_reference_computes(name: str, weight: Any, numbers: str, rewrite: str) -> None:
    layer, x = make(name, weight, INPUTS[numbers], **REWRITES[rewrite])
    taken = [kernel for kernel in KERNELS["cpu"]() if kernel.declines(layer.operands) is None]
    assert layer.kernel is taken[0] if taken else layer.kernel.name == "reference"
    for dtype, kernel in itertools.product((torch.float32, torch.bfloat16, torch.float16), taken):
        here = layer.to(dtype)
        given = x.to(dtype)
        expected = oracle(here, given).float()
        with torch.no_grad():
            found = kernel.prepare(here.operands)(given, 0)
        assert found.dtype == dtype and found.shape == expected.shape
        largest = float(expected.abs().max())
        rounding = torch.finfo(dtype).eps * largest + 1e-5 * largest
        if numbers == "float" and not REWRITES[rewrite]:  # weights and products are rounded to the dtype of the input
            rounding += torch.finfo(dtype).eps * float(oracle(here, given.abs()).float().abs().max()) + 3 * torch.finfo(dtype).eps * largest
        folded = largest / FOLDED[kernel.name] if kernel.name in FOLDED and weight[1].startswith("group") else 0.0
        error = (found.float() - expected).abs()
        assert float(error.max()) <= rounding + folded + (0 if numbers == "float" else 2 * one_code(here)), kernel.name
        if numbers != "float":  # codes that go the other way are rare, so most outputs agree to rounding
            assert float(error.median()) <= rounding + folded / 4, kernel.name


@pytest.mark.parametrize("width", [0.5, 2])
@pytest.mark.parametrize("numbers", ["int8", "int8 token", "int8 sample", "float"])
@pytest.mark.parametrize("weight", [("int8", "channel"), ("int4", "group-64")], ids="-".join)
@pytest.mark.parametrize("name", ["Linear", "Conv2d"])
def test_an_input_of_another_width_is_refused(name: str, weight: Any, numbers: str, width: float) -> None:
    """Before any memory is read or written by it."""
    if ("sample" if name == "Linear" else "token") in numbers:
        pytest.skip("linear layers have tokens, convolutions samples")
    layer, x = make(name, weight, INPUTS[numbers])
    axis = x.ndim - 1 if name == "Linear" else 1
    wrong = x.narrow(axis, 0, int(x.shape[axis] * width)) if width < 1 else torch.cat([x] * int(width), axis)
    for kernel, given in itertools.product(KERNELS["cpu"](), (wrong.contiguous(), wrong[:1].contiguous())):
        if kernel.declines(layer.operands) is None:
            with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
                kernel.prepare(layer.operands)(given, 0)


@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("name", ["Conv2d", "Conv2d same", "Conv3d"])
def test_scales_per_sample_do_not_depend_on_the_rest_of_the_batch(name: str, rewrite: str) -> None:
    """In either memory order."""
    layer, x = make(name, ("int8", "channel"), INPUTS["int8 sample"], **REWRITES[rewrite])
    x[0] *= 100
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    with torch.no_grad():
        alone = layer(x[1:])
        assert torch.equal(layer(x)[1:], alone) and torch.equal(layer(last)[1:], alone)
        assert float((alone - oracle(layer, x)[1:]).abs().max()) <= 2 * one_code(layer)


@pytest.mark.parametrize("name", ["Linear", "Conv2d"])
def test_protected_steps_mix_channels_too(name: str) -> None:
    """A kernel that rounds protected steps from the same repacked weight gets an input that is mixed once, not twice."""
    layer, x = make(name, ("int8", "channel"), INPUTS["int6"], **REWRITES["mix"])
    operands = layer.operands
    finer = replace(operands, input=operands.input.with_bits(8))
    runner = layer.kernel.prepare(operands)
    if not hasattr(runner, "rounding"):
        pytest.skip(f"{layer.kernel.name} prepares protected steps anew")
    found, expected = runner.rounding(finer)(x, 0), Reference(finer)(x)
    assert float((found - expected).abs().max()) <= one_code(layer) and float((found - expected).abs().median()) < 1e-4
    assert torch.equal(runner.codes(), layer.codes) if getattr(runner, "codes", None) else True


def kernels_of(name: str, weight: Any, numbers: str, rewrite: str = "") -> tuple[str, dict[str, str]]:
    layer, _ = make(name, weight, INPUTS[numbers], **REWRITES[rewrite])
    kernel, refused = layer.selected
    return kernel.name, refused


@vnni
def test_the_table_says_what_runs_and_why_the_better_ones_do_not() -> None:
    without = int8_tiles.available()
    small = ("int8 quads", {"int8 tiles": without}) if without else ("int8 tiles", {})
    assert kernels_of("Linear", ("int8", "channel"), "int8") == small
    assert kernels_of("Conv3d", ("int6", "channel"), "uint8") == small
    name, refused = kernels_of("Linear", ("int4", "group-64"), "int8 token")
    grouped = "weights have a scale per group-64"
    assert name == "onednn int8 from int4"
    assert refused == {"int8 tiles": without or grouped, "int8 quads": grouped, "onednn int8": grouped}
    name, refused = kernels_of("Linear", ("int8", "channel"), "float")
    assert name == "float products" and refused["onednn int8"] == "the input stays float"
    assert kernels_of("Conv1d", ("int8", "channel"), "int8") == small
    layer, _ = make("Linear", ("e4m3", "channel"), INPUTS["int8"])
    assert layer.kernel.name == "reference" and layer.simulated
    assert set(layer.selected[1]) == {kernel.name for kernel in KERNELS["cpu"]()} and "e4m3" in layer.selected[1]["onednn int8"]


@vnni
def test_large_layers_are_left_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_quads, "SMALL", 10)
    large = "more than 10 weights"
    expected = {"int8 tiles": int8_tiles.available() or large, "int8 quads": large}
    assert kernels_of("Linear", ("int8", "channel"), "int8") == ("onednn int8", expected)
    name, refused = kernels_of("Conv1d", ("int8", "channel"), "int8")
    assert name == "int16 pairs" and "one-dimensional" in refused["onednn int8"]


@vnni
@pytest.mark.parametrize("channels", [3, 64, 509])
@pytest.mark.parametrize("zero", [0, 128, 255])
def test_products_of_the_largest_codes_are_exact(channels: int, zero: int) -> None:
    """Four products of 8-bit numbers are added in 32 bits, not in 16; also where rows end within four numbers."""
    weight = torch.full((33, channels), -128, dtype=torch.int8)
    weight[::2] = 127
    panels = int8_quads.panelled(weight[..., None])
    assert torch.equal(int8_quads.unpanelled(panels, 33, channels), weight)
    codes = np.full(97 * channels + 3, 255, np.uint8)
    scale, bias, sums = np.ones(64, np.float32), np.zeros(64, np.float32), np.zeros(64, np.int32)
    sums[:33] = weight.sum(1, dtype=torch.int32).numpy()
    rows, out = np.arange(97, dtype=np.int64) * channels, np.empty((97, 33), np.float32)
    given = codes, rows, np.zeros(1, np.int64), panels.numpy(), scale, sums, bias, zero, np.float32(1), loops.NONE, 1, 0
    quad_tile.multiply(0, 2, *given, out)
    assert np.array_equal(out, np.tile((255 - zero) * sums[:33].astype(np.float32), (97, 1)))


@pytest.mark.parametrize(
    ("able", "allowed", "reason"),
    [
        ({}, True, "the processor has no AMX instructions for bytes"),
        ({"amx_tile": True, "amx_int8": True}, False, "the system does not let this process use AMX"),
        ({"amx_tile": True, "amx_int8": True}, True, None),
    ],
)
def test_tiles_need_the_processor_and_the_system(able: Any, allowed: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: allowed)
    assert int8_tiles.available.__wrapped__() == reason


@amx
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("numbers", ["int8", "uint8"])
def test_tiles_multiply_what_quads_multiply(name: str, numbers: str) -> None:
    """To the last bit, for layers of any geometry, also where rows end within 64 bytes or 32 rows; both give the weight back."""
    layer, x = make(name, ("int8", "channel"), INPUTS[numbers], shift=True)
    tiles, quads = int8_tiles.TileProduct(layer.operands), int8_quads.QuadProduct(layer.operands)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(tiles(x.to(dtype), 0), quads(x.to(dtype), 0))
        assert torch.equal(tiles(x.to(dtype), 0, "gelu"), quads(x.to(dtype), 0, "gelu"))
    assert torch.equal(tiles._stored(), quads._stored())


@amx
@pytest.mark.parametrize("channels", [3, 64, 509])
@pytest.mark.parametrize("zero", [0, 255])
def test_tiles_of_the_largest_codes_are_exact(channels: int, zero: int) -> None:
    """Rows that lie equally far apart are multiplied where they are, others are copied; 97 rows are both."""
    weight = torch.full((33, channels), -128, dtype=torch.int8)
    weight[::2] = 127
    panels = int8_tiles.panelled(weight[..., None])
    codes = np.full(97 * channels + amx_tile.BYTES, 255, np.uint8)
    scale, bias, sums = np.ones(64, np.float32), np.zeros(64, np.float32), np.zeros(64, np.int32)
    sums[:33] = weight.sum(1, dtype=torch.int32).numpy()
    rows, out = np.arange(97, dtype=np.int64) * channels, np.empty((97, 33), np.float32)
    weights = panels.numpy(), channels, amx_tile.CONFIG, scale, sums, bias
    amx_tile.multiply(0, 2, codes, rows, np.zeros(1, np.int64), *weights, zero, np.float32(1), loops.NONE, 1, 0, out)
    assert np.array_equal(out, np.tile((255 - zero) * sums[:33].astype(np.float32), (97, 1)))


@vnni
@pytest.mark.parametrize("numbers", ["int8", "uint8", "int8 token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_is_two_loops(numbers: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding and multiplying in one call gives the bits of the two loops, whether the codes are known or not."""
    layer, x = make("Linear", ("int8", "channel"), INPUTS[numbers], shift=True, scale=True)
    given, runner = x.to(dtype), layer.kernel.prepare(layer.operands)
    first, again = runner(given, 0), runner(given, 0)
    monkeypatch.setattr(loops, "alone", lambda elements: False)
    assert torch.equal(first, again) and torch.equal(first, runner(given.clone(), 0))


@pytest.mark.parametrize("rewrite", ["", "shift and scale"])
@pytest.mark.parametrize("numbers", ["int8", "uint8", "int8 sample"])
@pytest.mark.parametrize("channels", [5, 8])
def test_codes_of_planes_are_those_of_pixels(channels: int, numbers: str, rewrite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of an input's memory; narrow planes are turned before."""
    layer, _ = make("Conv2d", ("int8", "channel"), INPUTS[numbers], **REWRITES[rewrite])
    operands = layer.operands
    some = {name: None if (one := getattr(operands, name)) is None else one[:channels] for name in ("shift", "scale")}
    weight = replace(operands.weight, shape=(operands.weight.shape[0], channels, *operands.weight.shape[2:]))
    inputs = Inputs(replace(operands, weight=weight, **some))
    x = torch.randn(2, channels, 18, 15, generator=torch.Generator().manual_seed(0))
    expected = inputs.pixels(x.contiguous(memory_format=torch.channels_last), 0, (1, 1, 2, 0))
    kept = expected.codes.astype(np.int32)
    for narrow in (0, 1 << 20):
        monkeypatch.setattr(inputs_module, "NARROW", narrow)
        found = inputs.pixels(x, 0, (1, 1, 2, 0))
        away = np.abs(found.codes.astype(np.int32) - kept)
        assert away.max() <= 1 and away.mean() < 1e-3 and not found.poisoned
        assert found.scales is None or np.allclose(found.scales, expected.scales, rtol=1e-6)


@pytest.mark.skipif(int16_madd.available() is not None, reason=str(int16_madd.available()))
def test_without_vnni_products_are_integers_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    without = "the processor has no VNNI instructions"
    monkeypatch.setattr(int8, "available", lambda: without)
    for weight in (("int8", "channel"), ("int6", "tensor"), ("int4", "group-64")):
        name, refused = kernels_of("Linear", weight, "int8")
        assert name == "int16 pairs" and without in refused.values()
    assert kernels_of("Linear", ("int4", "group-64"), "float")[0] == "float products"
    layer, x = make("Linear", ("int4", "group-64"), INPUTS["int8"], shift=True)
    coarse = nibbles.widened(layer.packed)
    error = (layer(x) - oracle(layer, x)).abs().median()
    rounded = ((coarse[0] * coarse[1][:, None] - layer.packed.dequantize()).abs().max() * x.abs().max() * 96) / 16
    assert float(error) < float(rounded)  # folded into 12 bits, not into 8


@pytest.mark.skipif(int16_madd.available() is not None, reason=str(int16_madd.available()))
def test_sums_that_do_not_fit_in_32_bits_are_refused() -> None:
    layer, _ = make("Linear", ("int8", "channel"), INPUTS["int8"])
    wide = replace(layer.operands, weight=replace(layer.packed, shape=(70, 66_000)))
    assert int16_madd.refuses(wide) == "rows of 66000 weights add up to more than 32 bits hold"
    assert int16_madd.top_of(13_824) * 255 * 13_824 <= int16_madd.SUM and int16_madd.top_of(96) == int16_madd.WIDEST


@pytest.mark.skipif(int16_madd.available() is not None, reason=str(int16_madd.available()))
@pytest.mark.parametrize("grain", ["group-64", "group-8", "channel"])
def test_scales_of_groups_are_read_where_they_are_stored(grain: str) -> None:
    """Inputs that are rows of the identity show the weight that is multiplied: it lies within half of an integer of its row."""
    module = nn.Linear(3000, 40, bias=False)  # more than one piece of a row, and a last group and panel that are not full
    layout = LayerLayout(TensorLayout("int4", grain), TensorLayout("int8", "tensor"), bias=False)
    layer: Any = quantized_class(module).like(module, layout)  # type: ignore[union-attr]
    torch.manual_seed(0)
    weight = torch.randn(40, 3000) * torch.rand(40, 3000)
    quantizer = fit(layout.weight.spec(), weight)
    codes = pack(quantizer.codes(weight), 4)
    layer.fill(LayerTensors(codes, quantizer.scale.to(layer.weight_scale.dtype), None, {"input_scale": torch.ones(1, 1)}))
    product = int16_madd.Int16Product(layer.operands)
    found, expected = product(torch.eye(3000)).T, layer.packed.dequantize()
    step = torch.from_numpy(product.scale)[:40, None]
    assert float(((found - expected).abs() / step).max()) <= (0.5 if grain != "channel" else 0) + 1e-3
    assert float((step[:, 0] * int16_madd.top_of(3000) / expected.abs().amax(1)).max()) <= 1 + 1e-6 or grain == "channel"
    assert np.shares_memory(product.scales, loops.view(layer.weight_scale))


@pytest.mark.parametrize(("size", "grain"), [(64, "group-64"), (8, "group-8"), (200, "channel")])
def test_tiles_are_filled_with_integers_of_the_stored_scales(size: int, grain: str) -> None:
    """The numbers that oneDNN would multiply; neither it nor VNNI is asked for."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (70, 200), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(70, -(-200 // size), generator=generator) + 0.1).bfloat16()
    step = scales[:, 0].float() if grain == "channel" else nibbles.row_scale(codes, scales.float(), size)
    tiles = nibbles._tiled(codes)
    found, sums = np.empty((*tiles.shape[:3], 256), np.int8), np.empty((len(tiles), 64), np.int32)
    loops.fill_tiles(0, len(tiles), tiles.numpy(), loops.view(scales), step.numpy(), size, found, sums)
    factors = (scales.float() / step[:, None]).repeat_interleave(size, 1)[:, :200]
    integers = ((codes.float() - 8) * factors).round().to(torch.int8)
    assert torch.equal(torch.from_numpy(found), nibbles._in_tiles(integers)) and int(integers.abs().max()) == (127 if size < 200 else 8)
    assert torch.equal(torch.from_numpy(sums).flatten()[:70], -integers.sum(1, dtype=torch.int32))


@pytest.mark.skipif(int16_madd.available() is not None, reason=str(int16_madd.available()))
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 1, 1), (6, 16, 2), (97, 257, 1537), (193, 40, 3076), (5, 530, 3)])
def test_the_largest_codes_are_multiplied_exactly(rows: int, columns: int, width: int) -> None:
    """Where 8-bit instructions would saturate: 127 and -128 everywhere, over the edges of tiles, panels and pieces."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(width, columns, bias=False)
    layout = LayerLayout(TensorLayout("int8", "channel"), TensorLayout("int8", "tensor"), bias=False)
    layer = quantized_class(module).like(module, layout)  # type: ignore[union-attr]
    codes = torch.randint(0, 2, (columns, width), generator=generator) * 255 - 128
    ones = torch.ones(columns)
    layer.fill(LayerTensors(codes.to(torch.int8), ones.to(layer.weight_scale.dtype), None, {"input_scale": torch.ones(1, 1)}))
    x = torch.randint(0, 2, (rows, width), generator=generator) * 255 - 128
    assert torch.equal(int16_madd.Int16Product(layer.operands)(x.float()).double(), (x.double() @ codes.double().T).float().double())


@pytest.mark.skipif(int16_madd.available() is not None, reason=str(int16_madd.available()))
@pytest.mark.parametrize("activation", [name for name in int16_madd.Int16Product.fused if name])
def test_an_activation_is_applied_before_the_output_is_written(activation: str) -> None:
    layer, x = make("Linear", ("int8", "channel"), INPUTS["int8 token"])
    runner = int16_madd.Int16Product(layer.operands)
    torch.testing.assert_close(runner(x, 0, activation), ACTIVATIONS[activation](runner(x)), rtol=1e-5, atol=1e-6)


def test_only_float_products_of_rounded_inputs_are_called_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not make("Linear", ("int8", "channel"), None)[0].simulated
    assert make("Linear", ("int8", "channel"), INPUTS["int8"])[0].simulated == (None not in (int8.available(), int16_madd.available()))
    for kernels in (int8, int16_madd):
        monkeypatch.setattr(kernels, "available", lambda: "not here")
    assert make("Linear", ("int8", "channel"), INPUTS["int8"])[0].simulated


def test_the_backend_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make("Linear", ("int8", "channel"), INPUTS["int8"])
    with backend("reference"):
        assert layer.kernel.name == "reference"
        layer(x)
    assert layer.kernel.name == "reference"  # prepared inside: it stays until the layer is moved, filled or released
    layer.release()
    assert layer.kernel.name != "reference"
    monkeypatch.setenv("REELQUANT_KERNELS", "reference")
    assert current_backend() == "reference" and select(layer.operands, "cpu")[0].name == "reference"
    monkeypatch.setenv("REELQUANT_KERNELS", "fast")
    with pytest.raises(RecipeError, match="unknown kernels 'fast'"):
        current_backend()
    with pytest.raises(RecipeError, match="did you mean 'reference'"), backend("referense"):
        pass


@pytest.mark.parametrize("numbers", ["int8", "uint8", "int8 token", "float"])
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "Conv3d", "Conv1d"])
def test_nan_shows_and_infinity_saturates(name: str, numbers: str) -> None:
    if "token" in numbers and name != "Linear":
        return
    layer, x = make(name, ("int8", "channel"), INPUTS[numbers], shift=True)
    for form in (x, x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x):
        broken = form.clone()
        broken[(0,) * broken.ndim] = torch.nan
        assert bool(layer(broken).isnan().any())
        assert bool(layer(form).isfinite().all())
        if numbers in ("int8", "uint8"):
            broken[(0,) * broken.ndim] = torch.inf
            large = broken.nan_to_num(posinf=1e30)
            assert torch.equal(layer(broken), layer(large)) and bool(layer(broken).isfinite().all())


# --- a weight that the kernel has taken over ----------------------------------------------------------------------------------------


@integers
@pytest.mark.parametrize("name", ["Linear", "Linear without bias", "Conv2d", "Conv3d", "Conv2d of one channel"])
@pytest.mark.parametrize("weight", [("int8", "channel"), ("int4", "group-64")], ids="-".join)
def test_a_prepared_layer_saves_copies_and_moves_the_weight_it_was_given(name: str, weight: Any) -> None:
    layer, x = make(name, weight, INPUTS["int8"], shift=True, scale=True)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    first = layer(x)
    if weight[0] == "int8" or "Linear" in name:
        assert layer.weight.untyped_storage().nbytes() == layer.weight.element_size()  # kept once: the kernel has it
    assert layer.weight.shape == before["weight"].shape and layer.weight.dtype == before["weight"].dtype
    for other in (layer.state_dict(), copy.deepcopy(layer).state_dict(), layer.to("cpu").state_dict()):
        assert all(torch.equal(other[key], before[key]) for key in before)
    layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), first) and twin.handle != layer.handle
    assert torch.equal(layer.packed.dequantize(), twin.packed.dequantize())
    layer.release()
    assert torch.equal(layer.weight, before["weight"])
    assert torch.equal(layer(x), first)


@integers
@pytest.mark.parametrize("attempt", range(5))
def test_threads_that_come_together_prepare_a_layer_once(attempt: int) -> None:
    layer, x = make("Linear", ("int8", "channel"), INPUTS["int8"])
    expected = oracle(layer, x)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(layer(x.clone()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=2 * one_code(layer))


@integers
def test_a_prepared_layer_takes_other_weights() -> None:
    layer, x = make("Linear", ("int8", "channel"), INPUTS["int8"])
    before = layer(x)
    rolled = layer.state_dict() | {"weight": layer.codes.roll(1, 0)}
    layer.load_state_dict(rolled)
    after = layer(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, oracle(layer, x), rtol=1e-4, atol=2 * one_code(layer))
    layer._parameters["weight"] = nn.Parameter(torch.zeros_like(rolled["weight"]), requires_grad=False)  # as offloading does it
    assert torch.equal(layer(x), layer.bias.expand_as(before))


# --- inputs -------------------------------------------------------------------------------------------------------------------------


@integers
@pytest.mark.parametrize("numbers", ["int8", "uint8"])
@pytest.mark.parametrize("name", ["Linear", "Conv2d"])
def test_every_step_has_its_own_scale(name: str, numbers: str) -> None:
    layer, x = make(name, ("int8", "channel"), INPUTS[numbers], slots=3, shift=True)
    clock = Clock([900.0, 500.0, 100.0])
    layer.clock = (clock,)
    outputs = []
    for timestep in (100.0, 900.0, 500.0, 100.0):
        clock.tick(timestep)
        outputs.append(layer(x))
        torch.testing.assert_close(outputs[-1], oracle(layer, x), rtol=1e-4, atol=2 * one_code(layer))
    assert torch.equal(outputs[0], outputs[3]) and not torch.equal(outputs[0], outputs[1])


@integers
def test_layers_that_read_one_tensor_share_its_codes_until_it_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    (query, x), (key, _) = (make("Linear", ("int8", "channel"), INPUTS["int8"]) for _ in range(2))
    encoded: list[Any] = []
    for module in (inputs_module, row_product):
        monkeypatch.setattr(module, "scratch", _counted(module.scratch, encoded))
    assert torch.equal(query(x), key(x)) and len(encoded) == 1
    key.input_scale *= 2
    key.release()
    key(x)
    assert len(encoded) == 2  # other numbers, other codes
    before = query(x).clone()
    x += 1
    assert not torch.equal(query(x), before)
    torch.testing.assert_close(query(x), oracle(query, x), rtol=1e-4, atol=2 * one_code(query))
    with torch.inference_mode():  # tensors there count no versions, so nothing is shared
        inference = torch.randn(3, 11, 96)
        before = query(inference).clone()
        inference += 1
        assert not torch.equal(query(inference), before)


def _counted(function: Any, calls: list[Any]) -> Any:
    def run(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    return run


@integers
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "Conv3d"])
def test_layouts_and_empty_inputs(name: str) -> None:
    layer, x = make(name, ("int8", "channel"), INPUTS["int8"], shift=True)
    expected = oracle(layer, x)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    variants = [x, x.movedim(1, 0).contiguous().movedim(0, 1), torch.stack([x, x], -1)[..., 0]]
    variants += [x.contiguous(memory_format=formats[x.ndim])] if x.ndim in formats else []
    for variant in variants:
        torch.testing.assert_close(layer(variant), expected, rtol=1e-4, atol=2 * one_code(layer))
    assert layer(x[:0]).shape == (0, *expected.shape[1:])
    torch.testing.assert_close(layer(x[:1]), expected[:1], rtol=1e-4, atol=2 * one_code(layer))
    if name != "Linear":
        torch.testing.assert_close(layer(x[0]), expected[0], rtol=1e-4, atol=2 * one_code(layer))


@pytest.mark.parametrize("block", [1, 2, 8, 16, 64, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_rotated_rows(block: int, dtype: torch.dtype) -> None:
    from reelquant.kernels import hadamard

    x = torch.randn(5, 3 * block).to(dtype)
    codes = torch.zeros(5, 3 * block, dtype=torch.uint8)
    numbers = (loops.np.float32(value) for value in (20 * block**-0.5, 128, 0, 255))
    loops.quantize_rows(0, 5, loops.view(x), block, loops.NONE, loops.NONE, *numbers, codes.numpy())
    exact = hadamard(x.double()) * 20 + 128
    assert float((codes.double() - exact.clamp(0, 255)).abs().max()) <= 0.5 + 1e-3


def test_rows_are_shared_by_threads_and_errors_come_back() -> None:
    x, codes = torch.randn(512, 256), torch.zeros(512, 256, dtype=torch.uint8)
    numbers = [loops.np.float32(value) for value in (20, 128, 0, 255)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        loops.spread(loops.quantize_rows, 512, x.numel(), x.numpy(), 1, loops.NONE, loops.NONE, *numbers, codes.numpy())
        with pytest.raises(ZeroDivisionError):
            loops.spread(lambda start, stop: (1 // 0) if start else None, 4, loops.SMALL + 1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(codes, (x * 20 + 128).round().clamp(0, 255).to(torch.uint8))


@vnni
def test_threads_that_share_a_matrix_of_bytes_do_not_meet() -> None:
    pairs = [make("Linear", ("int4", "group-64"), INPUTS["int8"]) for _ in range(2)]
    pairs[1][0].weight_scale *= 3
    pairs[1][0].release()
    expected = [layer(x) for layer, x in pairs]
    wrong: list[int] = []

    def run(i: int) -> None:
        layer, x = pairs[i]
        wrong.extend(i for _ in range(50) if not torch.equal(layer(x), expected[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- compiled graphs ----------------------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return F.silu(self.layer(hidden_states)) * 2


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "Conv3d"])
def test_one_graph_serves_all_steps(name: str) -> None:
    layer, x = make(name, ("int8", "channel"), INPUTS["int8"], slots=3)
    model = Denoiser(layer).eval()
    start_clock(model, Clock([900.0, 500.0, 100.0]), "timestep")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = [model(x, torch.tensor(timestep)) for timestep in (900.0, 500.0, 100.0)]
    with torch.no_grad():
        compiled(x, torch.tensor(900.0))
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for timestep, wanted in zip((900.0, 500.0, 100.0), expected, strict=True):
            assert torch.equal(compiled(x, torch.tensor(timestep)), wanted)


@vnni
def test_graphs_that_write_into_an_input_they_have_read_get_new_codes() -> None:
    """As Inductor does: into the same tensor, and its version does not tell."""
    (first, x), (second, _) = (make("Linear", ("int8", "channel"), INPUTS["int8 token"]) for _ in range(2))
    torch.ops.reelquant.layer(x, [], first.handle, "")
    version, other = x._version, torch.randn_like(x)
    x.numpy()[:] = other.numpy()
    assert x._version == version
    assert torch.equal(torch.ops.reelquant.layer(x, [], second.handle, ""), second(other))


# --- attention ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(1, 2, 700, 500, 64), (2, 1, 513, 1030, 128), (1, 1, 600, 600, 40), (40, 2, 8, 8, 64), (3, 16, 1280, 77, 64), (9, 4, 1, 1, 16)],
)
def test_attention_is_as_good_as_attention_in_bfloat16(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    batch, heads, queries, keys, head = shape
    query = torch.randn(batch, queries, heads, head).bfloat16().transpose(1, 2)
    key, value = (torch.randn(batch, heads, keys, head).bfloat16() for _ in range(2))
    if (reason := attention_bfloat16.refuses(query, key, value)) is not None:
        pytest.skip(reason)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    found = attention_bfloat16.attention(query, key, value)
    written_out = torch.softmax(query @ key.mT * head**-0.5, -1) @ value
    assert found.shape == exact.shape and found.dtype == torch.bfloat16
    assert found.transpose(1, 2).is_contiguous()
    assert float((found - exact).norm()) <= 1.1 * float((written_out - exact).norm())
    scaled = attention_bfloat16.attention(query, key, value, scale=0.5)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=0.5)
    assert float((scaled - exact).norm() / exact.norm()) < 0.05


@pytest.mark.skipif(int16_madd.available() is not None, reason=str(int16_madd.available()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "width"),
    [
        ((1, 2, 700, 600, 64), 64),
        ((2, 3, 97, 1030, 128), 128),
        ((1, 1, 1, 257, 40), 72),
        ((3, 2, 33, 31, 48), 16),
        ((1, 1, 300, 513, 256), 256),
    ],
)
def test_attention_in_fixed_point_is_better_than_attention_in_bfloat16(shape: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, heads, queries, keys, head = shape
    query = torch.randn(batch, queries, heads, head).to(dtype).transpose(1, 2)
    key, value = (torch.randn(batch, heads, keys, channels).to(dtype) for channels in (head, width))
    key[..., 0, :] *= 30  # a key that takes most of the weight, and many that share the rest
    value[..., 0] += 100
    for scale in (head**-0.5, 0.5):
        exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=scale)
        found = attention_fixed.attention(query, key, value, scale)
        q, k, v = (x.bfloat16() for x in (query, key, value))
        written_out = torch.softmax(q @ k.mT * scale, -1) @ v
        assert found.shape == exact.shape and found.dtype == dtype and found.transpose(1, 2).is_contiguous()
        rounding = torch.finfo(dtype).eps / 2 * float(exact.norm())
        assert float((found - exact).norm()) <= 0.6 * float((written_out - exact).norm()) + rounding


@pytest.mark.skipif(int16_madd.available() is not None, reason=str(int16_madd.available()))
def test_attention_in_fixed_point_keeps_a_long_tail() -> None:
    """One key as heavy as a hundred thousand others together: half of the answer is made of weights that one scale would round away."""
    keys, head = 1 << 17, 64
    key = torch.zeros(1, 1, keys, head)
    key[0, 0, 5, 0] = math.log(keys)
    query = torch.zeros(1, 1, 2, head)
    query[..., 0] = 1
    value = torch.ones(1, 1, keys, head)
    value[0, 0, 5] = -1
    found = attention_fixed.attention(query, key, value, scale=1.0)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=2e-3)


@pytest.mark.skipif(int16_madd.available() is not None, reason=str(int16_madd.available()))
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
def test_attention_in_fixed_point_leaves_strange_numbers_to_torch(which: int, strange: float) -> None:
    inputs = [torch.randn(1, 2, 300, 64, generator=torch.Generator().manual_seed(part)) for part in range(3)]
    inputs[which][0, 1, 7, 3] = strange
    found, expected = attention_fixed.attention(*inputs), F.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2, equal_nan=True)


def test_attention_refuses_what_torch_does_better(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 1024, 64)
    for capability in ("AVX2", "AVX512", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert (attention.refuses(x, x, x) is None) == (capability == "AVX2")
    assert "torch.float16" in str(attention.refuses(x.half(), x.half(), x.half()))
    assert attention.refuses(x[:, :, :100], x[:, :, :100], x[:, :, :100]) == "too short to gain"
    assert attention.refuses(x[..., :8], x[..., :8], x[..., :8]) == "heads of 8 channels"
    assert "heads share keys" in str(attention.refuses(x, x[:, :1], x[:, :1]))
    half = x.bfloat16()
    assert attention_bfloat16.refuses(x, x, x) == "not bfloat16"
    assert attention_bfloat16.refuses(half[..., :8], half[..., :8], half[..., :8]) == "heads of 8 channels"


def test_a_kernel_is_named_once() -> None:
    names = [kernel.name for device in KERNELS.values() for kernel in device()]
    assert len(names) == len(set(names)) and all(isinstance(kernel, Kernel) for device in KERNELS.values() for kernel in device())
    assert nibbles.TILE == 64
