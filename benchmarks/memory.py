"""Peak memory of one denoiser step at full depth, where weights are most of it: bf16 and this library, a fresh process each.

    python -m benchmarks.memory --model wan-1.3b-deep --output benchmarks/results

*process* is the high-water mark of resident pages while the step runs; *denoiser* is that without what the process held before it opened
the denoiser (interpreter, torch, diffusers). The compiler of our loops is loaded with the first layer and counts as ours. Weights are
rounded to nearest and inputs per token, because that needs no data: static recipes take as much memory.

A float checkpoint stays mapped, and where memory is short the system takes its pages back while the step runs: the mark is too low
then, below the checkpoint's own size. ``--like wan-14b`` computes the row of bf16 instead: the checkpoint, and what a model of that width
and fewer layers takes beside its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.speed import memory, tables
from benchmarks.speed.denoisers import DENOISERS, Subject
from benchmarks.speed.tables import Row
from benchmarks.speed.variants import BASE, stepping

HEADINGS = ("variant", "process, MB", "of bf16", "denoiser, MB", "of bf16", "checkpoint, MB", "denoiser while loading, MB")
INPUT = {"format": "int8", "granularity": "token", "dynamic": True}
WEIGHTS = {"ours w8a8": {"format": "int8", "granularity": "channel"}, "ours w4a8": {"format": "int4", "granularity": "group-64"}}


def float_folder(subject: Subject) -> Path:
    """The bf16 checkpoint of the subject, made if it is not there yet."""
    folder = subject.home / "float-bf16"
    if not folder.is_dir():
        subject.spec.make(torch.bfloat16).save_pretrained(folder)
    return folder


def folder_of(name: str, subject: Subject) -> Path:
    """A checkpoint of the subject, quantized while diffusers loads the float one if it is not there yet."""
    from reelquant import ReelQuantConfig

    folder = subject.home / name.replace(" ", "-")
    if not folder.is_dir():
        import diffusers

        recipe = {"name": name, "defaults": {"weight": WEIGHTS[name], "input": INPUT}, "calibrate": None}
        kind = getattr(diffusers, subject.spec.cls)
        made = kind.from_pretrained(float_folder(subject), quantization_config=ReelQuantConfig(recipe), torch_dtype=torch.bfloat16)
        made.save_pretrained(folder)
    return folder


def peak_of(name: str, subject: Subject, calls: int) -> None:
    """In a fresh process: the peaks of one variant, opened as a user would."""
    import diffusers

    import reelquant  # noqa: F401

    folder = float_folder(subject) if name == BASE else folder_of(name, subject)
    kind = getattr(diffusers, subject.spec.cls)

    def build() -> Callable[[], object]:
        return stepping(subject, kind.from_pretrained(folder, torch_dtype=torch.bfloat16).eval(), torch.bfloat16)

    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    memory.answer(memory.peaks(build, calls) | {"stored_mb": round(stored / memory.MB)})


def prepare(name: str, subject: Subject, calls: int) -> None:
    """In a fresh process: the checkpoint of one variant."""
    _ = float_folder(subject) if name == BASE else folder_of(name, subject)
    memory.answer({})


def computed(deep: Subject, like: Row) -> Row:
    """The row of bf16 that :func:`main` would have measured with enough memory: its checkpoint, and the rest of a shallower model."""
    stored = round(sum(file.stat().st_size for file in float_folder(deep).glob("*.safetensors")) / memory.MB)
    return like | {"name": f"{BASE}, computed", "stored_mb": stored, "rss_mb": like["rss_mb"] - like["stored_mb"] + stored}


def line(row: Row, base: Row) -> list[str]:
    """A row of the table."""
    own, float_own = (one["rss_mb"] - one["rss_bare_mb"] for one in (row, base))
    return [
        row["name"], f"{row['rss_mb']:.0f}", f"{row['rss_mb'] / base['rss_mb']:.2f}", f"{own:.0f}", f"{own / float_own:.2f}",
        f"{row['stored_mb']:.0f}", f"{row['rss_build_mb'] - row['rss_bare_mb']:.0f}",
    ]  # fmt: skip


def main() -> None:
    """Parse the command line, measure, write."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--model", choices=DENOISERS, default="wan-1.3b-deep")
    made.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    made.add_argument("--work", type=Path, default=Path("runs/speed"), help="checkpoints, made once")
    made.add_argument("--calls", type=int, default=2, help="of the denoiser; bf16 takes minutes for one where the processor has none")
    made.add_argument("--like", choices=DENOISERS, help="a shallower model of the same width, for the row of bf16 where memory is short")
    made.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = made.parse_args()
    torch.set_num_threads(1)
    subject = Subject(args.model, args.work)
    if args.child:
        return {"prepare": prepare, "peak": peak_of}[args.child[0]](args.child[1], subject, args.calls)
    options = ["--model", args.model, "--work", str(args.work), "--calls", str(args.calls)]
    rows: list[Row] = []
    for name in (BASE, *WEIGHTS):
        given = [*options, "--model", args.like] if args.like and name == BASE else options
        for each in (options, given):
            memory.in_fresh_process("benchmarks.memory", [*each, "--child", "prepare", name])
        row = {"name": name} | memory.in_fresh_process("benchmarks.memory", [*given, "--child", "peak", name])
        rows.append(computed(subject, row) if given is not options else row)
        print("  ", rows[-1], flush=True)
    title = f"## Peak memory of one step of {args.model} ({DENOISERS[args.model].reduced})"
    print(tables.write(args.output, f"memory-{args.model}", title, HEADINGS, rows, [line(row, rows[0]) for row in rows]))
    return None


if __name__ == "__main__":
    main()
