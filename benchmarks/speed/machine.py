"""What this machine can do at most: multiplications per second in each number format, bytes per second, and what it is.

Two peaks are measured. *Registers*: a loop of the vector instruction itself on registers, compiled by the C compiler if there is one:
nothing that multiplies can be faster. *GEMM*: the best matrix product that torch and oneDNN reach over a few shapes. A kernel's share of
the register peak says how much there is left to win.

    python -m benchmarks.speed.machine --output benchmarks/results
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import markdown
from benchmarks.speed import raw
from benchmarks.speed.timing import interleaved
from reelquant.evidence.speed import SHORT
from reelquant.kernels import native_float

ISA = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "sve")
SHAPES = ((1024, 1024, 1024), (2048, 1536, 1536), (2048, 3072, 1536), (1024, 4096, 1024))
BUFFER = 256 << 20  # bytes, far more than any cache
NATIVE = native_float()
FLOAT = SHORT[NATIVE]
"""The float numbers that this processor multiplies: bf16, or fp32 where bf16 is emulated. The time of eager torch in this
dtype is the base of all ratios, because users run models in it."""


# --- peak of the vector units ---------------------------------------------------------------------------------------------------------

CHAINS = 14  # independent sums: enough to hide the latency of an instruction, few enough for 16 registers
INSTRUCTIONS: dict[str, tuple[tuple[str, str, str, int], ...]] = {
    "fp32": (
        ("avx512f", "zmm", "vfmadd231ps %zmm15, %zmm15, {sum}", 32),
        ("avx2", "ymm", "vfmadd231ps %ymm15, %ymm15, {sum}", 16),
    ),
    "bf16": (("avx512_bf16", "zmm", "vdpbf16ps %zmm15, %zmm15, {sum}", 64),),
    "int8": (
        ("avx512_vnni", "zmm", "vpdpbusd %zmm15, %zmm15, {sum}", 128),
        ("avx2", "ymm", "vpmaddwd %ymm15, %ymm15, %ymm14\\n vpaddd %ymm14, {sum}, {sum}", 32),
    ),
}
"""Format -> ways, best first: the flag it needs, registers, instructions, multiplications and additions of one. 8-bit integers without VNNI
are pairs of 16 bits, because the 8-bit instruction saturates."""


def _source(registers: str, instructions: str) -> str:
    """C that repeats instructions on registers that hold zeros; written out, because compilers keep arrays of registers in memory."""
    clear = '"vzeroall\\n"'
    body = "".join(f'"{instructions.format(sum=f"%{registers}{i}")}\\n"' for i in range(CHAINS))
    used = ", ".join(f'"xmm{i}"' for i in range(16))
    clear, body = clear.replace("%", "%%"), body.replace("%", "%%")
    return f'void run(long n) {{ __asm__ volatile ({clear} "1:\\n" {body} "dec %0\\n jnz 1b\\n" : "+r"(n) : : {used}, "cc"); }}'


def register_peaks(rounds: int = 4_000_000) -> dict[str, float | str]:
    """Operations per second by format, or the reason why it is not known."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return {"reason": "no C compiler"}
    if "avx2" not in cpu()["flags"]:
        return {"reason": "no AVX2, which the loop is written for at least"}
    there = {name: next((way for way in ways if way[0] in cpu()["flags"]), None) for name, ways in INSTRUCTIONS.items()}
    return {name: _register_peak(compiler, *way[1:3], rounds) * way[3] for name, way in there.items() if way is not None}


def _register_peak(compiler: str, registers: str, instructions: str, rounds: int) -> float:
    """Sums per second."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.c"), Path(folder, "peak.so")
        source.write_text(_source(registers, instructions))
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
        function = ctypes.CDLL(str(library)).run
    function.argtypes = [ctypes.c_long]
    samples = interleaved({"": lambda: function(rounds)}, rounds=5)[""]
    return rounds * CHAINS / min(samples.seconds)


# --- peak of GEMM, memory -------------------------------------------------------------------------------------------------------------


def _float_product(dtype: torch.dtype) -> Callable[[int, int, int], Callable[[], object]]:
    def make(m: int, k: int, n: int) -> Callable[[], object]:
        x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        return lambda: torch.nn.functional.linear(x, weight)

    return make


PRODUCTS = {"fp32": _float_product(torch.float32), "bf16": _float_product(torch.bfloat16), "int8": raw.random_linear}


def gemm_peaks(rounds: int = 5) -> dict[str, float]:
    """The most operations per second that a matrix product reaches, by format."""
    found: dict[str, float] = {}
    for name, make in PRODUCTS.items():
        for m, k, n in SHAPES:
            samples = interleaved({"": make(m, k, n)}, rounds=rounds, warmup=2)[""]
            found[name] = max(found.get(name, 0.0), 2 * m * k * n / min(samples.seconds))
    return found


def bandwidth(rounds: int = 5) -> dict[str, float]:
    """Bytes per second from memory: read only, and copied (read plus written)."""
    a, b = torch.ones(BUFFER // 4), torch.empty(BUFFER // 4)
    samples = interleaved({"read": a.sum, "copy": lambda: b.copy_(a)}, rounds=rounds)
    return {name: moved * BUFFER / min(samples[name].seconds) for name, moved in (("read", 1), ("copy", 2))}


# --- what it is -----------------------------------------------------------------------------------------------------------------------


def cpu() -> dict[str, Any]:
    """Name, flags and caches as the system tells them."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.is_file() else ""
    name = re.search(r"^(?:model name|Hardware)\s*:\s*(.*)$", text, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.M)
    return {
        "name": name[1] if name else platform.processor() or platform.machine(),
        "flags": [flag for flag in (flags[1].split() if flags else []) if flag in ISA],
        "cores": text.count("processor\t:") or 1,
    }


def versions() -> dict[str, str]:
    """Of torch, the oneDNN in it, and Python."""
    onednn = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    return {"torch": torch.__version__, "onednn": onednn[1] if onednn else "none", "python": platform.python_version()}


def limits(threads: int = 1) -> dict[str, Any]:
    """Everything above, measured now with this number of threads (register peaks are of one core)."""
    torch.set_num_threads(threads)
    return {
        "cpu": cpu(), "versions": versions(), "threads": threads, "registers": register_peaks(), "gemm": gemm_peaks(),
        "bandwidth": bandwidth(),
    }  # fmt: skip


def known(output: Path, threads: int = 1) -> dict[str, Any]:
    """The limits in ``machine.json`` if they are of this machine and torch, else measured and kept there."""
    file = output / "machine.json"
    if file.is_file():
        found = json.loads(file.read_text())
        if (found["cpu"], found["versions"], found["threads"]) == (cpu(), versions(), threads):
            return found
    output.mkdir(parents=True, exist_ok=True)
    found = limits(threads)
    file.write_text(json.dumps(found, indent=2) + "\n")
    return found


def peak(found: dict[str, Any], name: str) -> float:
    """Operations per second that nothing can exceed: of the registers, else of GEMM. Per core times threads."""
    registers = found["registers"].get(name)
    return registers * found["threads"] if registers else found["gemm"][name]


def describe(found: dict[str, Any]) -> str:
    """One line for the top of a table."""
    told, made = found["cpu"], found["versions"]
    return (
        f"{told['name']}, {found['threads']} thread(s) of {told['cores']} cores, {' '.join(told['flags'])}; "
        f"torch {made['torch']}, oneDNN {made['onednn']}"
    )


def table(found: dict[str, Any]) -> str:
    """Peaks as Markdown, billions per second."""
    names = list(INSTRUCTIONS)
    giga = lambda value: f"{value / 1e9:.0f}" if isinstance(value, float) else "-"  # noqa: E731
    rows = [[kind, *(giga(found[kind].get(name)) for name in names)] for kind in ("registers", "gemm")]
    moved = ", ".join(f"{name} {value / 1e9:.0f} GB/s" for name, value in found["bandwidth"].items())
    note = f"\nregister peaks unknown: {found['registers']['reason']}\n" if "reason" in found["registers"] else ""
    return f"{describe(found)}\n\n{markdown(['G operations/s', *names], rows)}{note}\nmemory: {moved}\n"


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options.add_argument("--threads", type=int, default=1)
    args = options.parse_args()
    (args.output / "machine.json").unlink(missing_ok=True)
    print(table(known(args.output, args.threads)))


if __name__ == "__main__":
    main()
