"""How fast the Triton kernels are on this machine's GPU, next to what torch offers: ``python -m benchmarks.gpu --output FOLDER``.

Every group of rows (one shape) is measured interleaved: each round runs every variant once, in turn, so that clocks and temperature are
shared; the figures are medians over the rounds. *device* is time between CUDA events, *host* the time until the launches are queued,
which is what a small layer in eager mode really costs. *of peak* is relative to the fastest square product that torch reaches here in
the same type (of int8, for attention with int8 scores, although half of its work is in the type of the values). *error* is the
root-mean-square difference to the float32 result of the same floats, relative to that result.

The group *denoiser* times one call of a whole quantized denoiser with attention in float and in few bits, and says what computed it.

``--dry`` runs tiny shapes in Triton's interpreter on a CPU: it shows that the script works, its times mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Run = Callable[[], Any]
LINEAR = [  # rows, input and output channels: a 1.3-billion and a 14-billion parameter video transformer, and a small batch
    (32760, 1536, 1536), (32760, 1536, 8960), (32760, 8960, 1536), (32760, 5120, 5120), (32760, 5120, 13824),
    (512, 5120, 5120), (2, 5120, 5120),
]  # fmt: skip
ATTENTION = [
    (1, 12, 32760, 32760, 128),
    (1, 40, 8190, 8190, 128),
    (2, 12, 32760, 512, 128),
    (1, 24, 16384, 16384, 64),
    (4096, 8, 16, 16, 64),
]
CONVOLUTION = [  # batch, channels, output channels, spatial size, kernel
    (32, 320, 320, (64, 64), (3, 3)), (32, 1280, 1280, (16, 16), (3, 3)), (2, 320, 320, (16, 64, 64), (3, 1, 1)),
    (1, 128, 128, (17, 240, 416), (3, 3, 3)), (32, 640, 320, (64, 64), (1, 1)),
]  # fmt: skip
PEAK = [4096, 8192, 16384]
DENOISER = [("wan-1.3b", {"num_layers": 1}, (1, 16, 21, 60, 104))]  # 32760 tokens, one of 30 layers; and a sixteenth of them, two layers
DENOISER += [("wan-1.3b", {"num_layers": 2}, (1, 16, 6, 26, 50))]
DYNAMIC = {
    "name": "w8a8-dynamic",
    "defaults": {
        "weight": {"format": "int8", "granularity": "channel"},
        "input": {"format": "int8", "granularity": "token", "dynamic": True},
    },
    "rules": [{"on": "role:entry | role:exit", "keep": True}],
    "calibrate": None,
}
DRY: dict[str, list[Any]] = {
    "DENOISER": [
        (
            "wan-1.3b",
            {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 64, "text_dim": 16, "freq_dim": 16},
            (1, 16, 1, 6, 10),
        )
    ],
    "PEAK": [32], "LINEAR": [(33, 64, 40)], "ATTENTION": [(1, 2, 33, 40, 32)],
    "CONVOLUTION": [(1, 32, 8, (5, 6), (3, 3)), (1, 32, 8, (3, 4, 4), (3, 1, 1))],
}  # fmt: skip
FIELDS = ["group", "shape", "variant", "device_ms", "host_ms", "teraops", "of_peak", "speedup", "error"]


@dataclass
class Bench:
    """Settings of a measurement. ``device`` is ``cpu`` in a dry run."""

    device: str
    rounds: int
    milliseconds: float  # a variant runs as often in a row as fits in here

    def once(self, run: Run, repeats: int) -> tuple[float, float]:
        """Milliseconds per call on the device and on the host."""
        if self.device == "cpu":
            start = time.perf_counter()
            run()
            passed = (time.perf_counter() - start) * 1e3
            return passed, passed
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        host = (time.perf_counter() - start) * 1e3 / repeats
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / repeats, host

    def interleaved(self, variants: dict[str, Run]) -> dict[str, tuple[float, float]]:
        """Medians of all rounds; a first, unmeasured round compiles and tunes."""
        for run in variants.values():
            self.once(run, 2)
        repeats = {name: max(1, min(50, int(self.milliseconds / self.once(run, 1)[0]))) for name, run in variants.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for _ in range(self.rounds):
            for name, run in variants.items():
                times[name].append(self.once(run, repeats[name]))
        return {
            name: (statistics.median(device for device, _ in found), statistics.median(host for _, host in found))
            for name, found in times.items()
        }


def error(found: Any, expected: Tensor) -> float:
    """Relative root-mean-square difference of (the first of) the results."""
    found = (found[0] if isinstance(found, tuple) else found).float()
    return float((found - expected).norm() / expected.norm())


def rows(
    bench: Bench, group: str, shape: Any, variants: dict[str, Run], operations: float, peaks: dict[str, float], expected: Tensor | None
) -> Iterator[dict[str, Any]]:
    """Measure one shape. The first variants whose names start with ``torch`` are the reference; the best of them counts."""
    working: dict[str, Run] = {}
    for name, run in variants.items():
        try:
            run()
        except (RuntimeError, NotImplementedError) as reason:  # a backend that torch does not offer for this shape
            print(f"  {name}: not here ({str(reason).splitlines()[0][:100]})", file=sys.stderr)
            continue
        working[name] = run
    times = bench.interleaved(working)
    reference = min((device for name, (device, _) in times.items() if name.startswith("torch bf16")), default=float("nan"))
    for name, (device, host) in times.items():
        teraops = operations / device / 1e9
        peak = peaks.get(next((kind for kind in ("fp8", "int8", "bf16") if kind in name), ""), float("nan"))
        yield {
            "group": group, "shape": "x".join(str(s).replace(" ", "") for s in shape), "variant": name, "device_ms": round(device, 4),
            "host_ms": round(host, 4), "teraops": float(f"{teraops:.4g}"), "of_peak": round(teraops / peak, 3),
            "speedup": round(reference / device, 3), "error": "" if expected is None else f"{error(working[name](), expected):.2e}",
        }  # fmt: skip


def codes_of(x: Tensor, kind: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """Codes of a weight with one scale per row, and the scales."""
    scale = x.float().abs().flatten(1).amax(1) / largest
    unit = x.float() / scale.view(-1, *[1] * (x.ndim - 1))
    return (unit.round() if kind == torch.int8 else unit).to(kind), scale


def peak(bench: Bench, sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Square products of torch itself: what the chip is known to reach."""
    for n in sizes:
        a, b = (torch.randn(n, n, device=bench.device).bfloat16() for _ in range(2))
        (ai, _), (bi, _) = codes_of(a, torch.int8, 127), codes_of(b, torch.int8, 127)
        af, bf, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=bench.device)
        variants: dict[str, Run] = {
            "torch bf16": lambda a=a, b=b: a @ b.t(),
            "torch int8": lambda a=ai, b=bi: torch._int_mm(a, b.t()),
            "torch fp8": lambda a=af, b=bf, one=one: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
        }
        yield from rows(bench, "peak", (n, n, n), variants, 2 * n**3, {}, None)


def linear(bench: Bench, peaks: dict[str, float], shape: tuple[int, int, int]) -> Iterator[dict[str, Any]]:
    """A linear layer from bf16 to bf16: with codes given, and with the rounding of the input included."""
    from reelquant.formats import pack
    from reelquant.kernels import cuda, torch_ops

    m, k, n = shape
    x, w = torch.randn(m, k, device=bench.device).bfloat16(), (torch.randn(n, k, device=bench.device) / k**0.5).bfloat16()
    bias = torch.randn(n, device=bench.device).bfloat16()
    table = (x.abs().max().float() / 127).reshape(1, 1)
    (wi, si), (wf, sf) = codes_of(w, torch.int8, 127), codes_of(w, torch.float8_e4m3fn, 448)
    fp8 = torch.float8_e4m3fn
    xi, (xf, xs) = cuda.quantize_static(x, table), cuda.quantize_per_token(x, dtype=fp8)
    grouped = F.pad(w.float(), (0, -k % 64)).reshape(n, -1, 64)
    scale4 = (grouped.abs().amax(2) / 7).bfloat16()
    nibbles = (grouped / scale4.float()[..., None]).round().clamp(-8, 7).add(8).to(torch.uint8).flatten(1)[:, :k]
    w4, s4, _ = cuda.repack_4bit(pack(nibbles, 4), scale4.reshape(-1), k)
    variants: dict[str, Run] = {
        "torch bf16": lambda: F.linear(x, w, bias),
        "torch int8 (fall-back)": lambda: torch_ops.linear_8bit(xi, wi, table, si, bias=bias),
        "int8, codes given": lambda: cuda.linear_8bit(xi, wi, table, si, bias=bias),
        "int8 with rounding": lambda: cuda.linear_8bit(cuda.quantize_static(x, table), wi, table, si, bias=bias),
        "int8 x 4 bit, codes given": lambda: cuda.linear_w4a8(xi, w4, s4, table, bias=bias),
        "bf16 x 4 bit": lambda: cuda.linear_w4a16(x, w4, s4, bias),
        "bf16 x 8 bit": lambda: cuda.linear_w8a16(x, wi, si, bias),
        "quantize int8 alone": lambda: cuda.quantize_static(x, table),
        "fp8, codes given": lambda: cuda.linear_8bit(xf, wf, xs, sf, bias=bias),
        "fp8 with rounding": lambda: (lambda c, s: cuda.linear_8bit(c, wf, s, sf, bias=bias))(*cuda.quantize_per_token(x, dtype=fp8)),
    }
    expected = F.linear(x.float(), w.float(), bias.float())
    for row in rows(bench, "linear", shape, variants, 2.0 * m * k * n, peaks, None):
        if "quantize" not in row["variant"] and "to int8" not in row["variant"]:
            row["error"] = f"{error(variants[row['variant']](), expected):.2e}"
        yield row


def attention(bench: Bench, peaks: dict[str, float], shape: tuple[int, int, int, int, int]) -> Iterator[dict[str, Any]]:
    """Attention of random tokens; the reference is the best backend of torch."""
    from reelquant.kernels import cuda

    batch, heads, queries, tokens, width = shape
    q = torch.randn(batch, queries, heads, width, device=bench.device).bfloat16().transpose(1, 2)
    k, v = (torch.randn(batch, tokens, heads, width, device=bench.device).bfloat16().transpose(1, 2) for _ in range(2))

    def stock(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    names = ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"] if bench.device == "cuda" else ["MATH"]
    variants: dict[str, Run] = {f"torch bf16 {name.lower()}": lambda name=name: stock(getattr(SDPBackend, name)) for name in names}
    variants["int8 scores"] = lambda: cuda.attention_8bit(q, k, v)
    variants["int8 scores, e4m3 values"] = lambda: cuda.attention_8bit(q, k, v, float8_values=True)
    yield from rows(bench, "attention", shape, variants, 4.0 * batch * heads * queries * tokens * width, peaks, None)
    part = slice(0, min(queries, 256))  # an oracle for some queries of the first head: all scores would not fit
    exact = F.scaled_dot_product_attention(q[:1, :1, part].float(), k[:1, :1].float(), v[:1, :1].float())
    for name in ("int8 scores", "int8 scores, e4m3 values"):
        print(f"  {name}: error {error(variants[name]()[:1, :1, part], exact):.2e}", file=sys.stderr)


def denoiser(bench: Bench, peaks: dict[str, float], shape: tuple[str, dict[str, Any], tuple[int, ...]]) -> Iterator[dict[str, Any]]:
    """One call of a denoiser in bf16, with quantized layers, and with few-bit attention beside them."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton, which must not happen before --dry is looked at

    import reelquant
    from benchmarks.speed.denoisers import DENOISERS, Sampler
    from reelquant.kernels.attention import AttentionQuant
    from reelquant.nn import attention_facts, kernels_of, round_attention

    name, changed, latent = shape
    spec = replace(DENOISERS[name], config=DENOISERS[name].config | changed, latent=latent)
    plain = spec.make().to(torch.bfloat16)
    layers = copy.deepcopy(plain)
    reelquant.quantize(Sampler(spec, layers), DYNAMIC)
    models = {"torch bf16": plain.to(bench.device), "w8a8": layers.to(bench.device)}
    for numbers in (AttentionQuant(), AttentionQuant(values="e4m3")):
        models[f"w8a8, {numbers}"] = copy.deepcopy(layers)
        round_attention(models[f"w8a8, {numbers}"], numbers)
    inputs = _to(bench.device, spec.inputs(plain, torch.bfloat16))

    def step(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(**inputs)[0]

    variants: dict[str, Run] = {name: lambda model=model: step(model) for name, model in models.items()}
    with FlopCounterMode(display=False) as counted:
        expected = variants["torch bf16"]().float()
    yield from rows(bench, "denoiser", latent, variants, counted.get_total_flops(), {}, expected)
    print(f"  layers: {kernels_of(models['w8a8']).names}", file=sys.stderr)
    for model in models.values():
        if (facts := attention_facts(model)) is not None:
            print(f"  {facts.asked}: {facts.by}; calls {facts.calls}", file=sys.stderr)


def _to(device: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to(device, item) for key, item in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def convolution(bench: Bench, peaks: dict[str, float], shape: tuple[int, int, int, Any, Any]) -> Iterator[dict[str, Any]]:
    """A padded convolution; the reference is cudnn in bf16, channels-last."""
    from reelquant.kernels import cuda

    batch, channels, columns, sizes, kernel = shape
    flat = len(sizes) == 2
    memory = torch.channels_last if flat else torch.channels_last_3d
    run = F.conv2d if flat else F.conv3d
    x = torch.randn(batch, channels, *sizes, device=bench.device).bfloat16().contiguous(memory_format=memory)
    w = (torch.randn(columns, channels, *kernel, device=bench.device) / channels**0.5).bfloat16().contiguous(memory_format=memory)
    pads, ones = [n // 2 for n in kernel], [1] * len(kernel)
    wi, si = codes_of(w, torch.int8, 127)
    packed, table = cuda.repack_convolution(wi), (x.abs().max().float() / 127).reshape(1, 1)
    rounded = lambda: cuda.quantize_static(x.movedim(1, -1), table).movedim(-1, 1)  # noqa: E731
    xi = rounded()
    variants: dict[str, Run] = {
        "torch bf16 cudnn": lambda: run(x, w, None, 1, pads),
        "int8, codes given": lambda: cuda.convolution_8bit(xi, packed, table, si, ones, pads, ones),
        "int8 with rounding": lambda: cuda.convolution_8bit(rounded(), packed, table, si, ones, pads, ones),
    }
    operations = 2.0 * batch * columns * channels
    for n in (*sizes, *kernel):
        operations *= n
    yield from rows(bench, "convolution", shape, variants, operations, peaks, run(x.float(), w.float(), None, 1, pads))


def write(folder: Path, found: list[dict[str, Any]], facts: str) -> None:
    """``gpu.csv`` and ``gpu.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "gpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(found)
    lines = [f"{facts}\n", "| " + " | ".join(FIELDS) + " |", "|" + "---|" * len(FIELDS)]
    lines += ["| " + " | ".join(str(row[name]) for name in FIELDS) + " |" for row in found]
    (folder / "gpu.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of gpu.csv and gpu.md")
    parser.add_argument("--only", nargs="*", choices=["linear", "attention", "convolution", "denoiser"], help="groups to measure")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds per shape")
    parser.add_argument("--milliseconds", type=float, default=20.0, help="how long a variant runs in one round")
    parser.add_argument("--dry", action="store_true", help="tiny shapes in the interpreter, on a CPU")
    arguments = parser.parse_args()
    if arguments.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("there is no CUDA device here; --dry shows that the script runs")
    from reelquant.kernels import cuda

    if (reason := cuda.available()) is not None:
        sys.exit(f"the kernels cannot run: {reason}")
    if arguments.dry:
        from tests.unit.kernels.cuda import rounding

        rounding.install()
        from reelquant.kernels import KERNELS
        from reelquant.kernels.attention import ROUNDED

        KERNELS["cpu"], ROUNDED["cpu"] = KERNELS["cuda"], ROUNDED["cuda"]
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    bench = Bench("cpu" if arguments.dry else "cuda", 1 if arguments.dry else arguments.rounds, arguments.milliseconds)
    sizes: dict[str, list[Any]] = (
        DRY if arguments.dry else {"PEAK": PEAK, "LINEAR": LINEAR, "ATTENTION": ATTENTION, "CONVOLUTION": CONVOLUTION, "DENOISER": DENOISER}
    )
    import triton

    name = "Triton's interpreter: times mean nothing" if arguments.dry else torch.cuda.get_device_name()
    facts = f"{name}; torch {torch.__version__}, triton {triton.__version__}; medians of {bench.rounds} interleaved rounds"
    found = list(peak(bench, sizes["PEAK"]))
    kinds = {row["variant"].split()[1] for row in found}
    peaks = {kind: max(row["teraops"] for row in found if kind in row["variant"]) for kind in kinds}
    groups = ((linear, "LINEAR"), (attention, "ATTENTION"), (convolution, "CONVOLUTION"), (denoiser, "DENOISER"))
    for group, key in groups:
        if arguments.only and group.__name__ not in arguments.only:
            continue
        for shape in sizes[key]:
            print(group.__name__, shape, file=sys.stderr)
            found += list(group(bench, peaks, shape))
            write(arguments.output, found, facts)  # after every shape: a killed run keeps what it measured
            if bench.device == "cuda":
                torch.cuda.empty_cache()
    print((arguments.output / "gpu.md").read_text() if found else "nothing measured")


if __name__ == "__main__":
    main()
