"""From prompt to frames: the bundled pipelines in the float numbers of the machine, in float32 and quantized, interleaved in one process.

Run it from the repository root::

    python -m benchmarks.end_to_end --pipeline tiny-dit --output benchmarks/results
    python -m benchmarks.end_to_end --pipeline tiny-unet --quantized out/mine --rounds 5
    python -m benchmarks.end_to_end --pipeline tiny-dit --cores        # one and two threads, free cores and shared ones

A time is one pipeline call: text encoder, all denoising steps, decoder. Besides it: PSNR of the clips to those of float32, and of the
quantized pipeline to itself on the reference kernels, which tells whether the fast ones compute the same. These models are small
(64 to 192 channels), so a step is mostly overhead; what kernels win on real widths is told by ``benchmarks.step``.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reelquant
from benchmarks.common import Clips, Records, denoiser, markdown, number
from benchmarks.speed import machine, tables
from benchmarks.speed.tables import Row
from benchmarks.speed.timing import Samples, clock_for, interleaved, speedup
from reelquant.evidence import psnr
from reelquant.kernels import backend
from reelquant.models.pipelines import BUNDLED, open_pipeline
from reelquant.nn import quantized_layers
from reelquant.recipes.recipe import load_recipe

BASE, REFERENCE = machine.FLOAT, "fp32"
HEADINGS = ("variant", "s per clip", f"speed over {BASE} (quartiles)", "PSNR to fp32, dB", "PSNR to reference kernels, dB", "kernels")


def quantized(clips: Clips, recipe: str, work: Path) -> Path:
    """The pipeline quantized by a recipe, made once."""
    folder = work / f"{clips.name}-{recipe}-{load_recipe(recipe).digest()[:8]}"
    if not folder.is_dir():
        print(f"  quantizing {clips.name} with {recipe}", flush=True)
        pipe = clips.open()
        reelquant.save(pipe, folder, reelquant.quantize(pipe, recipe, **clips.call))
    return folder


def pipelines(clips: Clips, recipes: list[str], folder: Path | None, work: Path) -> dict[str, Any]:
    """Everything that is timed, opened as a user would."""
    found = {BASE: clips.open(machine.NATIVE), REFERENCE: clips.open()}
    folders = {"ours": folder} if folder else {f"ours {recipe}": quantized(clips, recipe, work) for recipe in recipes}
    found |= {name: open_pipeline(folder, machine.NATIVE) for name, folder in folders.items()}
    if find_spec("openvino") is not None:
        found |= {f"{name} openvino": in_openvino(folder) for name, folder in folders.items()}
    return found


def in_openvino(folder: Path) -> Any:
    """A quantized pipeline whose denoiser runs as one graph."""
    pipe = open_pipeline(folder, machine.NATIVE)
    reelquant.configure(pipe, runtime="openvino")
    return pipe


def distance(frames: Tensor, other: Tensor) -> float:
    """Mean PSNR over the clips, dB."""
    return float(torch.as_tensor(psnr(other, frames.nan_to_num(0.0))).mean())


def row(name: str, pipe: Any, frames: dict[str, Tensor], times: dict[str, Samples], clips: Clips) -> Row:
    """The record of one variant."""
    ratio, seconds = speedup(times[BASE], times[name]), times[name].spread
    found: Row = {
        "name": name, "seconds": seconds.median / clips.count, "ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high,
        "psnr": None if name == REFERENCE else distance(frames[name], frames[REFERENCE]),
    }  # fmt: skip
    kernels = Counter(layer.kernel.name for layer in quantized_layers(denoiser(pipe)[1]).values())
    if not kernels:
        return found
    return found | {"kernels": dict(kernels), "psnr_kernels": distance(frames[name], by_the_oracle(pipe, clips))}


def by_the_oracle(pipe: Any, clips: Clips) -> Tensor:
    """The same clips with every quantized layer computed by the reference, and attention by torch."""
    layers = quantized_layers(denoiser(pipe)[1]).values()
    for layer in layers:
        layer.release()
    try:
        with backend("reference"):
            return clips.frames(pipe)
    finally:
        for layer in layers:
            layer.release()


def run(clips: Clips, pipes: dict[str, Any], rounds: int, threads: int) -> list[Row]:
    """Time all pipelines in turns and hold their clips against each other."""
    frames: dict[str, Tensor] = {}

    def sampling(name: str) -> Callable[[], None]:
        return lambda: frames.update({name: clips.frames(pipes[name])})

    clock = clock_for(threads, own_threads=True)  # one for all: OpenVINO computes on threads of its own
    times = interleaved({name: sampling(name) for name in pipes}, rounds=rounds, clock=clock)
    return [row(name, pipe, frames, times, clips) for name, pipe in pipes.items()]


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Inside, so many other processes keep a core each busy, the first cores of the machine."""
    endless = "import os\nos.sched_setaffinity(0, {%d})\nwhile True: pass"
    busy = [subprocess.Popen([sys.executable, "-c", endless % core]) for core in range(count)]
    try:
        yield
    finally:
        for one in busy:
            one.kill()
            one.wait()


def on_cores(clips: Clips, recipe: str, work: Path, rounds: int) -> Iterator[str]:
    """A table that grows by a row: speed over float32 by one thread and by two, on free cores and on cores that a busy process shares.

    By wall time. The last row may take a hundred times as long as the first: a thread of PyTorch's waits for a core at every product.
    """
    pipes = {"float": clips.open(), "quantized": open_pipeline(quantized(clips, recipe, work))}
    functions = {name: functools.partial(clips.frames, pipe) for name, pipe in pipes.items()}
    found = []
    for shared in (False, True):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with neighbours(2 if shared else 0):
                times = interleaved(functions, rounds=rounds, clock=time.perf_counter)
            ratio = speedup(times["float"], times["quantized"])
            where = "a busy neighbour each" if shared else "free"
            found.append([str(threads), where, f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"])
            yield markdown(("threads", "two cores", f"{recipe} over float32, quartiles"), found)


def line(row: Row) -> list[str]:
    """A row of the Markdown table."""
    decibels = [f"{row[key]:.1f}" if row.get(key) is not None else "-" for key in ("psnr", "psnr_kernels")]
    ratio = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
    kernels = ", ".join(f"{count} x {name}" for name, count in row.get("kernels", {}).items())
    return [row["name"], f"{row['seconds']:.2f}", ratio, *decibels, kernels or "-"]


def main() -> None:
    """Parse the command line, measure, write."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--pipeline", default="tiny-dit", help=f"{' or '.join(BUNDLED)}, or a folder")
    options.add_argument("--recipes", nargs="*", default=["qvd-w8a8", "qvd-w4a8", "w8a16"])
    options.add_argument("--quantized", type=Path, help="time this quantized folder instead of recipes")
    options.add_argument("--clips", type=int, default=2)
    options.add_argument("--set", type=number, nargs="*", default=[], metavar="KEY=NUMBER", help="arguments of the pipeline call")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--cores", action="store_true", help="only the first recipe, by one and two threads, on free and on shared cores")
    options.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options.add_argument("--work", type=Path, default=Path("runs/speed"), help="quantized folders, made once")
    args = options.parse_args()
    clips = Clips(args.pipeline, args.clips, dict(args.set))
    if args.cores:
        for table in on_cores(clips, args.recipes[0], args.work, args.rounds):
            text = f"{clips.name}, {clips.count} clips, {machine.cpu()['name']}\n\n{table}"
            (args.output / f"cores-{clips.name}.md").write_text(text)
            print(text, flush=True)
        return
    torch.set_num_threads(args.threads)
    limits = machine.known(args.output, args.threads)
    rows = run(clips, pipelines(clips, args.recipes, args.quantized, args.work), args.rounds, args.threads)
    for one in rows:
        Records(args.output / "end_to_end.jsonl").add(one | {"digest": clips.digest, "threads": args.threads, "torch": torch.__version__})
    name, title = f"end-to-end-{clips.name}", f"{clips.name}, {clips.count} clips, prompt to frames"
    print(tables.write(args.output, name, f"## {title}\n\n{machine.describe(limits)}", HEADINGS, rows, list(map(line, rows))))
    tables.bars(args.output / f"{name}.png", title, rows)


if __name__ == "__main__":
    main()
