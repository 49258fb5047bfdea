"""Peak memory of one denoiser step at full depth, where weights are most of it: bf16 and this library, a fresh process each.

    python -m benchmarks.memory --model wan-1.3b-deep --output benchmarks/results

*process* is the high-water mark of resident pages while the step runs; *denoiser* is that without what the process held before it opened
the denoiser (interpreter, torch, diffusers). The compiler of our loops is loaded with the first layer and counts as ours.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.speed import memory, tables
from benchmarks.speed.denoisers import DENOISERS, Subject
from benchmarks.speed.tables import Row
from benchmarks.speed.variants import BASE, VARIANTS

HEADINGS = ("variant", "process, MB", "of bf16", "denoiser, MB", "of bf16", "while loading, MB")
NAMES = (BASE, "ours qvd-w8a8", "ours minmax-w8a8", "ours qvd-w4a8")


def peak_of(name: str, subject: Subject) -> None:
    """In a fresh process: the peaks of one variant."""
    import diffusers  # noqa: F401  # belongs to the bare process

    import reelquant  # noqa: F401

    memory.answer(memory.peaks(lambda: VARIANTS[name].make(subject).run))


def prepare(subject: Subject) -> None:
    """Make the checkpoints, in a process that measures nothing."""
    subject.load()
    for name in NAMES[1:]:
        subject.quantize(name.removeprefix("ours "))


def line(row: Row, base: Row) -> list[str]:
    """A row of the table."""
    own, float_own = (one["rss_mb"] - one["rss_bare_mb"] for one in (row, base))
    return [
        row["name"], f"{row['rss_mb']:.0f}", f"{row['rss_mb'] / base['rss_mb']:.2f}", f"{own:.0f}", f"{own / float_own:.2f}",
        f"{row['rss_build_mb']:.0f}",
    ]  # fmt: skip


def main() -> None:
    """Parse the command line, measure, write."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--model", choices=DENOISERS, default="wan-1.3b-deep")
    made.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    made.add_argument("--work", type=Path, default=Path("runs/speed"), help="checkpoints, made once")
    made.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = made.parse_args()
    torch.set_num_threads(1)
    subject = Subject(args.model, args.work)
    if args.peak_of:
        return peak_of(args.peak_of, subject)
    prepare(subject)
    options = ["--model", args.model, "--work", str(args.work)]
    rows = [{"name": name} | memory.in_fresh_process("benchmarks.memory", [*options, "--peak-of", name]) for name in NAMES]
    title = f"## Peak memory of one step of {args.model} ({DENOISERS[args.model].reduced})"
    print(tables.write(args.output, f"memory-{args.model}", title, HEADINGS, rows, [line(row, rows[0]) for row in rows]))
    return None


if __name__ == "__main__":
    main()
