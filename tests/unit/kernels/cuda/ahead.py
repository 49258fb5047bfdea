"""Compile kernels for a GPU that is not here: ``python -m tests.unit.kernels.cuda.ahead 90 gemm`` prints one line per kernel and tile
(``--first``: only the first tile of each kernel).

Triton's compiler needs no device, only the name of a target. Launches are replaced by compilations, and every tile configuration that
tuning would try is compiled, so the whole path runs except for the kernel itself. Columns: kernel, tile, registers, bytes of local
memory per thread (spills), bytes of shared memory, tensor-core instructions (``wgmma`` on Hopper, ``mma`` before).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED = {80: 163_840, 89: 101_376, 90: 232_448}  # bytes a block may have; a larger tile is skipped by tuning on that chip


class AbsentDevice:
    """As much of a driver as compilation asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def resources(kernel: Any) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, as the assembler counted them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK", "LOCAL"))
    assert registers and stack and local, usage
    return int(registers[1]), int(stack[1]) + int(local[1])


def describe(name: str, kernel: Any, note: str) -> str:
    """One line about a compiled kernel."""
    registers, local = resources(kernel)
    found = sorted(set(re.findall(r"\b(wgmma\.mma_async|mma)\.sync\.aligned\.(m\w+)\.(?:row\.col\.)?([\w.]+)", kernel.asm["ptx"])))
    products = " ".join(f"{kind}.{shape}.{types}" for kind, shape, types in found) or "-"
    return f"{name} {note} registers={registers} local={local} shared={kernel.metadata.shared} {products}"


def compile_instead(capability: int, tiles: int) -> None:
    """From here on a launch compiles and prints; the first ``tiles`` configurations of each kernel."""
    driver.set_active(AbsentDevice(capability))
    torch.cuda.get_device_capability = lambda *_: divmod(capability, 10)
    original = JITFunction.run

    def compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        grid, _ = kwargs.pop("grid"), kwargs.pop("warmup")
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        note = ",".join(str(kwargs[key]) for key in kwargs if key.startswith("BLOCK")) + f" warps={kernel.metadata.num_warps}"
        fits = "" if kernel.metadata.shared <= SHARED[capability] else " (too much shared memory: skipped)"
        print(describe(self.__name__, kernel, note) + fits, flush=True)  # noqa: T201
        return kernel

    def every_tile(self: Any, *args: Any, **kwargs: Any) -> None:
        for config in self.configs[:tiles]:
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    JITFunction.run, Autotuner.run = compiled, every_tile


def quantize(capability: int) -> None:
    """Static and dynamic, with and without the rewrite."""
    from reelquant.kernels.cuda.launch import FP8
    from reelquant.kernels.cuda.quantize import quantize_per_sample, quantize_per_token, quantize_static

    x, one = torch.zeros(64, 1536, dtype=torch.bfloat16), torch.ones(1, 1)
    quantize_static(x, one)
    quantize_static(x, one.expand(4, 1).contiguous(), torch.tensor(1), pre_scale=torch.ones(1536))
    quantize_static(torch.zeros(64, 8960, dtype=torch.bfloat16), one, pre_shift=torch.zeros(8960))
    quantize_per_sample(x.view(4, 16, 1536), pre_scale=torch.ones(1536))
    if capability >= 89:
        quantize_per_token(x, pre_shift=x[0], dtype=FP8)


def gemm(capability: int) -> None:
    """int8 with the full epilogue, and float8."""
    from reelquant.kernels.cuda.gemm import linear_8bit
    from reelquant.kernels.cuda.launch import FP8

    x, weight, one = torch.zeros(4096, 1536, dtype=torch.int8), torch.zeros(1536, 1536, dtype=torch.int8), torch.ones(1, 1)
    scale = torch.ones(1536).bfloat16()
    linear_8bit(x, weight, one, scale, bias=scale)
    factor = torch.zeros(4096, 32).bfloat16()
    linear_8bit(x, weight, torch.ones(4096), scale, bias=scale, activation="gelu_tanh", down=factor, up=factor[:1536])
    if capability >= 89:
        linear_8bit(x.to(FP8), weight.to(FP8), torch.ones(4096), scale, bias=scale)


def attention(capability: int) -> None:
    """Heads of 64 and 128, a partial last tile, 16-bit and float8 values."""
    from reelquant.kernels.cuda.attention import attention_8bit

    for width in (64, 128):
        q = torch.zeros(1, 12, 1000, width, dtype=torch.bfloat16)
        attention_8bit(q, q, q)
        if capability >= 89:
            attention_8bit(q, q, q, float8_values=True)


def gemm_grouped(capability: int) -> None:
    """4-bit weights with both kinds of inputs, 8-bit weights with floats."""
    del capability
    from reelquant.kernels.cuda.gemm_grouped import linear_w4a8, linear_w4a16, linear_w8a16

    x, scale, one = torch.zeros(4096, 1536, dtype=torch.int8), torch.ones(24, 1536).bfloat16(), torch.ones(1, 1)
    linear_w4a8(x, x[:1536, :768].contiguous(), scale, one)
    linear_w4a16(x.bfloat16(), x[:1536, :768].contiguous(), scale)
    linear_w8a16(x.bfloat16(), x[:1536], scale[0])


def conv(capability: int) -> None:
    """3x3 with a shifted border, and 3x1x1 in float8."""
    from reelquant.kernels.cuda.conv import convolution_8bit
    from reelquant.kernels.cuda.launch import FP8

    x, one, ones = torch.zeros(2, 8, 32, 32, 320, dtype=torch.int8).movedim(-1, 1), torch.ones(1, 1), [1, 1, 1]
    weight, zeros = torch.zeros(320, 1, 3, 3, 320, dtype=torch.int8), torch.zeros(1, 320, dtype=torch.int8)
    convolution_8bit(x, weight, one, torch.ones(320), ones, [0, 1, 1], ones, pad_codes=zeros)
    convolution_8bit(x, weight, torch.ones(2), torch.ones(320), ones, [0, 1, 1], ones)
    if capability >= 89:
        convolution_8bit(x.to(FP8), weight[:, :, 1:2, 1:2].contiguous().to(FP8), one, torch.ones(320), ones, [0, 0, 0], ones)


def options(capability: int) -> None:
    """Sizes that nothing divides, strides, and every option once: what the interpreter accepts and the compiler might not."""
    from reelquant.kernels import cuda

    float8 = [torch.float8_e4m3fn] if capability >= 89 else []
    table, slot, one = torch.ones(3, 1), torch.tensor(1), torch.ones(1, 1)
    x, vector = torch.zeros(6, 50, 70).half(), torch.ones(70)
    for code in (torch.int8, *float8):
        rest = {"pre_shift": vector, "pre_scale": vector, "dtype": code}
        cuda.quantize_static(x, table, slot, **rest)
        cuda.quantize_per_token(x.transpose(0, 1), **rest)
    cuda.quantize_static(x, table, slot, zero_point=table)
    codes, weight, down = torch.zeros(50, 70, dtype=torch.int8), torch.zeros(90, 70, dtype=torch.int8), torch.zeros(50, 7).half()
    sums, up = cuda.weight_sums(weight), torch.zeros(90, 7).half()
    affine = {"input_zero_point": table, "weight_sums": sums}
    cuda.linear_8bit(codes.view(torch.uint8), weight, table, one, slot, activation="gelu", **affine)
    cuda.linear_8bit(codes.t().contiguous().t(), weight, torch.ones(50), one, activation="silu", down=down, up=up, out_dtype=torch.float32)
    packed, group_scale, float_sums = cuda.repack_4bit(torch.zeros(90, 35, dtype=torch.uint8), torch.ones(180).bfloat16(), 70)
    affine["weight_sums"] = float_sums
    cuda.linear_w4a8(codes, packed, group_scale, table, slot, activation="gelu", down=down, up=up, out_dtype=torch.float16, **affine)
    cuda.linear_w4a16(x, packed, group_scale, activation="gelu_tanh")
    for code in (torch.int8, *float8):
        cuda.linear_w8a16(x, weight.to(code), one[0], activation="silu")
    cuda.quantize_static(x, table, slot, zero_point=table, lowest=-128.0, highest=-65.0)
    for code in (torch.int8, *float8):
        if code != torch.int8:
            cuda.linear_8bit(codes.to(code), weight.to(code), table, one, slot)
        image, kernel = torch.zeros(2, 40, 3, 9, 7).to(code), torch.zeros(20, 3, 3, 3, 40).to(code)
        zeros = torch.zeros(3, 40).to(code)
        cuda.convolution_8bit(image, kernel, table, one[0], [1, 2, 1], [1, 1, 1], [1, 1, 2], slot, pad_codes=zeros, activation="silu")
        cuda.convolution_8bit(image, kernel, table, one[0], [1, 2, 1], [0, 0, 0], [1, 1, 2], slot, out_dtype=torch.float32)
    for width in (16, 40):
        q = torch.zeros(2, 4, 33, width).half()
        for float8_values in (False, *(True for _ in float8)):
            for mask in (None, torch.zeros(2, 1, 1, 33), torch.ones(1, 4, 1, 33, dtype=torch.bool)):
                cuda.attention_8bit(q, q[:, :2], q[:, :2], mask=mask, float8_values=float8_values)


PARTS: dict[str, Callable[[int], None]] = {part.__name__: part for part in (quantize, gemm, gemm_grouped, conv, attention, options)}


def main() -> None:
    capability, first = int(sys.argv[1]), "--first" in sys.argv
    compile_instead(capability, 1 if first else 100)
    for name in [part for part in sys.argv[2:] if part in PARTS] or PARTS:
        PARTS[name](capability)


if __name__ == "__main__":
    main()
