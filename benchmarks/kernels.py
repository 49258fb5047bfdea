"""One layer at a time: float, oneDNN's own int8 operators and the layers of this library, on the shapes of real video models.

Run it from the repository root::

    python -m benchmarks.kernels --output benchmarks/results                     # everything, about half an hour
    python -m benchmarks.kernels --kind gemm --models wan-1.3b cogvideox-5b --rounds 3

Every shape is timed with all variants taking turns; what is in the output already is not measured again (``--again`` does). ``bf16``, or
``fp32`` on processors without bfloat16, is torch's eager operator, convolutions channels-last; ``int_mm`` and ``onednn`` are the raw
integer products on inputs that are quantized already, so they are what a kernel could reach if everything around the product were free.
Ours is the whole layer with random codes: floats in, quantize, multiply, scale, floats out, by the kernel that the library chooses.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Records
from benchmarks.speed import machine, raw, tables
from benchmarks.speed.shapes import KINDS, MODELS, Attention, Conv, Gemm, Shape, shapes
from benchmarks.speed.tables import Row
from benchmarks.speed.timing import clock_for, interleaved, speedup
from reelquant.kernels import Reference
from reelquant.kernels import attention as fast
from reelquant.nn import LAYERS, LayerLayout, QuantLayer, TensorLayout

BASE = machine.FLOAT
HEADINGS = ("model", "shape", "variant", "ms", f"speed over {BASE} (quartiles)", "G op/s", "GB/s", "of peak", "error", "kernel")


@dataclass(frozen=True)
class Case:
    """Something to time and the float32 answer for the very same operands."""

    run: Callable[[], Tensor]
    expected: Callable[[], Tensor]
    kernel: str


Make = Callable[[Any], Case]


@dataclass(frozen=True)
class Variant:
    """One way to compute a shape.

    Attributes:
        make: a case of random operands.
        bytes: of an element of the input, the weight and the output.
        peak: number format whose peak it is held against.
    """

    make: Make
    bytes: tuple[float, float, float]
    peak: str


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes(*shape: int, signed: bool) -> Tensor:
    """Random 8-bit integers."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        -127 if signed else 0, 128 if signed else 256, shape, generator=generator, dtype=torch.int8 if signed else torch.uint8
    )


# --- matrix products ------------------------------------------------------------------------------------------------------------------


def linear(dtype: torch.dtype) -> Make:
    """``F.linear`` in float."""

    def make(shape: Gemm) -> Case:
        x, weight, bias = (
            value.to(dtype) for value in (random(shape.m, shape.k), random(shape.n, shape.k, seed=1), random(shape.n, seed=2))
        )
        return Case(lambda: F.linear(x, weight, bias), lambda: F.linear(x.float(), weight.float(), bias.float()), "torch")

    return make


def int_mm(shape: Gemm) -> Case:
    """torch's integer product: int8 in, int32 out."""
    x, weight = codes(shape.m, shape.k, signed=True), codes(shape.n, shape.k, signed=True)
    return Case(lambda: torch._int_mm(x, weight.T), lambda: x.float() @ weight.float().T, "torch._int_mm")


def onednn_linear(shape: Gemm) -> Case:
    """oneDNN's quantized linear layer: uint8 in, bf16 out."""
    x, weight = codes(shape.m, shape.k, signed=False), codes(shape.n, shape.k, signed=True)
    expected = lambda: (x.float() - raw.ZERO_POINT) @ weight.float().T * (raw.INPUT_SCALE * raw.WEIGHT_SCALE)  # noqa: E731
    return Case(raw.linear(x, weight), expected, "onednn::qlinear_pointwise")


# --- convolutions ---------------------------------------------------------------------------------------------------------------------


def _last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last if value.ndim == 4 else torch.channels_last_3d)


def _convolve(shape: Conv) -> Callable[..., Tensor]:
    operation = F.conv2d if len(shape.kernel) == 2 else F.conv3d
    return lambda x, weight, bias: operation(x, weight, bias, stride=shape.stride, padding=shape.padding)


def convolution(dtype: torch.dtype) -> Make:
    """Float, channels-last."""

    def make(shape: Conv) -> Case:
        x = _last(random(*shape.input_shape).to(dtype))
        weight = _last(random(shape.outputs, shape.channels, *shape.kernel, seed=1).to(dtype))
        bias, convolve = random(shape.outputs, seed=2).to(dtype), _convolve(shape)
        return Case(lambda: convolve(x, weight, bias), lambda: convolve(x.float(), weight.float(), bias.float()), "torch")

    return make


def onednn_convolution(shape: Conv) -> Case:
    """oneDNN's quantized convolution: uint8 in, bf16 out, channels-last."""
    x = _last(codes(*shape.input_shape, signed=False))
    weight = codes(shape.outputs, shape.channels, *shape.kernel, signed=True)
    work = raw.convolution(x, weight, stride=[shape.stride] * len(shape.kernel), padding=shape.padding)

    def expected() -> Tensor:
        scaled = (x.float() - raw.ZERO_POINT) * raw.INPUT_SCALE
        return _convolve(shape)(scaled, weight.float() * raw.WEIGHT_SCALE, None)

    return Case(work, expected, "onednn::qconv_pointwise")


# --- ours -----------------------------------------------------------------------------------------------------------------------------

WEIGHTS = {"w8": TensorLayout("int8", "channel"), "w4": TensorLayout("int4", "group-64")}
INPUTS = {"a8": TensorLayout("int8", "tensor"), "a16": None}
LAYOUTS: dict[str, LayerLayout] = {
    "ours w8a8": LayerLayout(WEIGHTS["w8"], INPUTS["a8"]),
    "ours w8a8 shift, scale": LayerLayout(WEIGHTS["w8"], INPUTS["a8"], shift=True, scale=True),
    "ours w4a8": LayerLayout(WEIGHTS["w4"], INPUTS["a8"]),
    "ours w8a16": LayerLayout(WEIGHTS["w8"]),
}
"""Layers as the recipes make them: qvd-w8a8 where shift and scale fold into the norm before, and where they do not; qvd-w4a8; w8a16."""


def _float_layer(shape: Gemm | Conv) -> nn.Module:
    with torch.device("meta"):
        if isinstance(shape, Gemm):
            return nn.Linear(shape.k, shape.n)
        kind = nn.Conv2d if len(shape.kernel) == 2 else nn.Conv3d
        return kind(shape.channels, shape.outputs, shape.kernel, shape.stride, shape.padding)


def layer(shape: Gemm | Conv, layout: LayerLayout) -> QuantLayer:
    """A quantized layer of random codes whose outputs have about unit variance."""
    stock = _float_layer(shape)
    made = LAYERS[type(stock)].like(stock, layout)
    width = math.prod(made.weight_shape[1:])
    scale = 1 / (width**0.5 * (4.6 if layout.weight.format == "int4" else 73))  # standard deviation of uniform codes
    values = {"weight_scale": scale, "input_scale": 3 / 127, "pre_quant_shift": 0.1, "pre_quant_scale": 1.1, "input_zero_point": 128}
    made.weight.data = codes(*made.weight.shape, signed=made.weight.dtype == torch.int8)
    for name, buffer in made.named_buffers(recurse=False):
        buffer.fill_(values[name])
    made.bias.data = random(len(made.bias), seed=2)
    return made.to(machine.NATIVE).eval()


def ours(layout: LayerLayout) -> Make:
    """A layer of this library, called as any module is."""

    def make(shape: Gemm | Conv) -> Case:
        made = layer(shape, layout)
        x = random(shape.m, shape.k) if isinstance(shape, Gemm) else _last(random(*shape.input_shape))
        x = x.to(machine.NATIVE)
        expected = lambda: Reference(made.operands)(x.float())  # noqa: E731
        return Case(lambda: made(x), expected, made.kernel.name)

    return make


# --- attention ------------------------------------------------------------------------------------------------------------------------


def _operands(shape: Attention, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    lengths = (shape.tokens, shape.keys, shape.keys)
    query, key, value = (random(shape.batch, shape.heads, n, shape.dim, seed=i).to(dtype) for i, n in enumerate(lengths))
    return query, key, value


def attention(dtype: torch.dtype, function: Callable[..., Tensor] = F.scaled_dot_product_attention, name: str = "torch sdpa") -> Make:
    """Softmax attention in float."""

    def make(shape: Attention) -> Case:
        operands = _operands(shape, dtype)
        return Case(lambda: function(*operands), lambda: _exact(operands), name)

    return make


def in_blocks(query: Tensor, key: Tensor, value: Tensor, rows: int = 256) -> Tensor:
    """The same by blocks of rows with two plain products each: faster than torch's on CPUs whose bf16 products are."""
    (q, k, v), scale = (x.flatten(0, 1) for x in (query, key, value)), query.shape[-1] ** -0.5
    if query.shape[2] <= rows:
        return torch.bmm(torch.softmax(torch.bmm(q * scale, k.mT), -1), v).view_as(query)
    output = torch.empty_like(q)
    for place in range(len(q)):
        for start in range(0, query.shape[2], rows):
            block = slice(start, start + rows)
            weights = torch.softmax(torch.mm(q[place, block] * scale, k[place].T), -1)
            torch.mm(weights, v[place], out=output[place, block])
    return output.view_as(query)


def our_attention(shape: Attention) -> Case:
    """Attention as quantized denoisers compute it: that of this library, or torch's where it says that it would not gain."""
    operands = _operands(shape, machine.NATIVE)
    reason = fast.refuses(*operands)
    if reason is not None:
        return Case(lambda: F.scaled_dot_product_attention(*operands), lambda: _exact(operands), f"torch sdpa: {reason}")
    return Case(lambda: fast.attention(*operands), lambda: _exact(operands), "ours")


def _exact(operands: tuple[Tensor, ...]) -> Tensor:
    return F.scaled_dot_product_attention(*(value.float() for value in operands))


# --- the table ------------------------------------------------------------------------------------------------------------------------

SIZE = machine.NATIVE.itemsize
WEIGHT_BYTES = {"int8": 1.0, "int4": 0.5 + 2 / 64}
_OURS = {
    name: Variant(ours(layout), (SIZE, WEIGHT_BYTES[layout.weight.format], SIZE), "int8" if layout.input else BASE)
    for name, layout in LAYOUTS.items()
}
VARIANTS: dict[str, dict[str, Variant]] = {
    "gemm": {
        BASE: Variant(linear(machine.NATIVE), (SIZE, SIZE, SIZE), BASE),
        "fp32": Variant(linear(torch.float32), (4, 4, 4), "fp32"),
        "int_mm": Variant(int_mm, (1, 1, 4), "int8"),
        "onednn": Variant(onednn_linear, (1, 1, 2), "int8"),
        **_OURS,
    },
    "conv": {
        BASE: Variant(convolution(machine.NATIVE), (SIZE, SIZE, SIZE), BASE),
        "fp32": Variant(convolution(torch.float32), (4, 4, 4), "fp32"),
        "onednn": Variant(onednn_convolution, (1, 1, 2), "int8"),
        **_OURS,
    },
    "attention": {
        BASE: Variant(attention(machine.NATIVE), (SIZE, SIZE, SIZE), BASE),
        "fp32": Variant(attention(torch.float32), (4, 4, 4), "fp32"),
        "in blocks": Variant(attention(machine.NATIVE, in_blocks, "two torch.mm"), (SIZE, SIZE, SIZE), BASE),
        "ours": Variant(our_attention, (SIZE, SIZE, SIZE), BASE),
    },
}


PATIENCE = 5.0
"""Seconds of one run above which a variant is not timed: ``torch._int_mm`` has no fast product on processors without VNNI."""


# --- measuring ------------------------------------------------------------------------------------------------------------------------


def cases(shape: Shape, variants: dict[str, Variant]) -> tuple[dict[str, Case], dict[str, Row]]:
    """What runs, and the rows of all: with the error of the result, or with the reason why there is none."""
    made: dict[str, Case] = {}
    rows: dict[str, Row] = {}
    for name, variant in variants.items():
        try:
            case = variant.make(shape)
            start = time.perf_counter()
            result = case.run().double()
            if (took := time.perf_counter() - start) > PATIENCE:
                raise TimeoutError(f"one run takes {took:.0f} s")
            expected = case.expected().double()
        except Exception as error:
            rows[name] = tables.failed({"variant": name}, error)
            continue
        made[name] = case
        error = float((result - expected).square().mean().sqrt() / expected.square().mean().sqrt())
        rows[name] = {"variant": name, "status": "measured", "kernel": case.kernel, "error": error}
    return made, rows


@torch.no_grad()
def measure(shape: Shape, variants: dict[str, Variant], limits: dict[str, Any], rounds: int, threads: int) -> list[Row]:
    """All variants of a shape, in turns."""
    made, rows = cases(shape, variants)
    found = interleaved({name: case.run for name, case in made.items()}, rounds=rounds, clock=clock_for(threads))
    for name, samples in found.items():
        variant, seconds, ratio = variants[name], samples.median, speedup(found[BASE], samples)
        moved = sum(count * size for count, size in zip(shape.numbers, variant.bytes, strict=True))
        rows[name] |= {
            "ms": 1e3 * seconds, "ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high,
            "gops": shape.operations / seconds / 1e9, "gbs": moved / seconds / 1e9,
            "share": shape.operations / seconds / machine.peak(limits, variant.peak), "rounds": rounds,
        }  # fmt: skip
    about = {"model": shape.model, "layer": shape.name, "shape": shape.shape}
    return [about | {"name": f"{shape.model} {shape.name}: {row['variant']}"} | row for row in rows.values()]


def run(kind: str, args: argparse.Namespace, records: Records, limits: dict[str, Any]) -> None:
    """Measure the shapes of a kind that are not there yet."""
    for shape in chosen(kind, args.models):
        names = [f"{shape.model} {shape.name}: {variant}" for variant in VARIANTS[kind]]
        key = digest(shape, args.threads)
        if not args.again and all(records.done(name, key) for name in names):
            continue
        for row in measure(shape, VARIANTS[kind], limits, args.rounds, args.threads):
            records.add(row | {"digest": key, "kind": kind, "threads": args.threads})
            print("  ".join(line(row)), flush=True)


def digest(shape: Shape, threads: int) -> str:
    """Rows of the same work can be compared."""
    return f"{shape.shape} {threads} {torch.__version__}"


def chosen(kind: str, models: Sequence[str]) -> list[Shape]:
    """Shapes of a kind and of these models."""
    return [shape for shape in shapes() if isinstance(shape, KINDS[kind]) and shape.model in models]


# --- tables ---------------------------------------------------------------------------------------------------------------------------


def line(row: Row) -> list[str]:
    """A row of the Markdown table."""
    where = [row["model"], f"{row['layer']} {row['shape']}", row["variant"]]
    if row["status"] != "measured":
        return [*where, row["status"], *["-"] * 5, row["reason"]]
    ratio = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
    numbers = [f"{row['gops']:.0f}", f"{row['gbs']:.1f}", f"{100 * row['share']:.0f} %", f"{row['error']:.1g}"]
    return [*where, f"{row['ms']:.2f}", ratio, *numbers, row["kernel"]]


def summary(rows: Sequence[Row], kind: str) -> list[Row]:
    """Per variant the median over the shapes, and the range."""
    found: list[Row] = []
    for name in VARIANTS[kind]:
        ratios = [row["ratio"] for row in rows if row["variant"] == name and "ratio" in row]
        if ratios:
            found.append({"name": name, "ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)})
    return found


def limit(rows: Sequence[Row], name: str, limits: dict[str, Any]) -> float:
    """How many times faster than eager torch the peak of a number format would be: median over the shapes."""
    peak = machine.peak(limits, name) / 1e9
    return statistics.median(peak / row["gops"] for row in rows if row["variant"] == BASE and "gops" in row)


def write(kind: str, args: argparse.Namespace, records: Records, limits: dict[str, Any]) -> str:
    """CSV, Markdown and charts of what is there."""
    keys = {digest(shape, args.threads) for shape in chosen(kind, MODELS)}
    rows = [row for row in records.load() if row["kind"] == kind and row["digest"] in keys]
    if not rows:
        return ""
    text = tables.write(args.output, f"kernels-{kind}", f"## {kind}\n\n{machine.describe(limits)}", HEADINGS, rows, list(map(line, rows)))
    title = f"{kind}: median over {len({row['digest'] for row in rows})} shapes, whiskers from the worst to the best"
    tables.bars(
        args.output / f"kernels-{kind}.png", title, summary(rows, kind), limit(rows, BASE if kind == "attention" else "int8", limits)
    )
    return text


def main() -> None:
    """Parse the command line, measure what is missing, write the tables."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kind", nargs="*", choices=KINDS, default=list(KINDS))
    options.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options.add_argument("--again", action="store_true", help="measure what is there already too")
    options.add_argument("--table", action="store_true", help="only write the tables from what is there")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    limits, records = machine.known(args.output, args.threads), Records(args.output / "kernels.jsonl")
    for kind in args.kind:
        if not args.table:
            run(kind, args, records, limits)
        print(write(kind, args, records, limits))


if __name__ == "__main__":
    main()
