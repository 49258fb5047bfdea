"""One denoiser step: this library, float and the peers, interleaved in one process.

Run it from the repository root, in an environment that holds the peers (those that are missing become rows that say so)::

    pip install --no-deps torchao sdnq optimum-quanto ninja orbitquant
    pip install openvino nncf onnxruntime onnx onnxscript
    python -m benchmarks.step --model wan-1.3b --output benchmarks/results
    python -m benchmarks.step --model unet3d --only "bf16;ours*;openvino*" --rounds 7

Times are CPU time of one thread (wall time with more), medians of interleaved rounds; a ratio compares two times of the same round.
Memory is the high-water mark of resident pages while the step runs, in a fresh process per variant. Errors are relative RMS to float32.
Denoisers have true widths, few layers and random weights (``benchmarks/speed/denoisers.py``): times per layer are real, errors are not a
measure of quality.
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Records
from benchmarks.speed import machine, memory, tables, work
from benchmarks.speed.denoisers import DENOISERS, Subject
from benchmarks.speed.tables import Row
from benchmarks.speed.timing import Samples, clock_for, interleaved, speedup
from benchmarks.speed.variants import BASE, REFERENCE, VARIANTS, Work, missing

HEADINGS = ("variant", "bits w/a", "ms", f"speed over eager {BASE} (quartiles)", "RSS, MB", "error to fp32", "note")


def error_to(reference: Tensor, output: Tensor) -> float:
    """Root of the mean square error over that of the reference; unitless."""
    return float((output.double() - reference.double()).square().mean().sqrt() / reference.double().square().mean().sqrt())


# --- preparing ------------------------------------------------------------------------------------------------------------------------


PATIENCE = 90.0
"""Seconds of one step above which a variant is not timed: one such would hold up all the others in every round."""


def bearable(step: Work) -> Tensor:
    """The output of a step; the first call may compile, so the second one decides.

    Raises:
        TimeoutError: if a step takes longer than :data:`PATIENCE`.
    """
    for _ in range(2):
        start = time.perf_counter()
        output = step.run()
        took = time.perf_counter() - start
        if took <= PATIENCE:
            return output
    raise TimeoutError(f"one step takes {took:.0f} s")


def prepare(name: str, subject: Subject, reference: Tensor | None) -> tuple[Row, Work | None]:
    """A row so far and the step, which has run once; without a step the row says why."""
    variant = VARIANTS[name]
    row: Row = {"name": name, "bits": variant.bits, "note": variant.note}
    if (command := missing(variant)) is not None:
        return row | {"status": "not installed", "reason": command}, None
    start = time.perf_counter()
    try:
        step = variant.make(subject)
        output = bearable(step).float().clone()
    except Exception as error:
        traceback.print_exc()
        return tables.failed(row, error), None
    row |= {"status": "prepared", "seconds_prepare": round(time.perf_counter() - start, 1), **step.facts}
    return row | {"error": None if reference is None else error_to(reference, output)}, step


def batches(names: Sequence[str], subject: Subject, reference: Tensor, limit: float) -> Iterator[tuple[list[Row], dict[str, Work]]]:
    """Prepared variants in as few sets as memory allows; the base is in every set."""
    base_row, base = prepare(BASE, subject, reference)
    if base is None:
        raise SystemExit(f"eager {BASE} does not run, there is nothing to compare with: {base_row['reason']}")
    rows, works = [base_row], {BASE: base}
    for name in names:
        print(f"  preparing {name}", flush=True)
        row, step = prepare(name, subject, reference)
        rows.append(row)
        if step is not None:
            works[name] = step
        del step
        gc.collect()
        if _resident() > limit and len(works) > 1:
            yield rows, works
            rows, works = [], {BASE: base}
            torch.compiler.reset()
            gc.collect()
    if rows:
        yield rows, works


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 if Path("/proc/self/statm").is_file() else 0.0


# --- measuring ------------------------------------------------------------------------------------------------------------------------


def timed(rows: list[Row], works: dict[str, Work], rounds: int, threads: int) -> list[Row]:
    """Rows with times and ratios."""
    clocks = {name: clock_for(threads, VARIANTS[name].own_threads) for name in works}
    found = interleaved({name: step.run for name, step in works.items()}, rounds=rounds, clock=clocks)
    return [row | figures(found[BASE], found[row["name"]]) if row["name"] in found else row for row in rows]


def figures(base: Samples, samples: Samples) -> Row:
    """What a row says about time."""
    ratio, spread = speedup(base, samples), samples.spread
    return {
        "status": "measured", "ms": 1e3 * spread.median, "ms_low": 1e3 * spread.low, "ms_high": 1e3 * spread.high,
        "ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high, "rounds": len(samples.seconds),
    }  # fmt: skip


def with_memory(row: Row, args: argparse.Namespace) -> Row:
    """The row with the peak of a fresh process."""
    if row["status"] != "measured":
        return row
    options = ["--model", args.model, "--work", str(args.work), "--threads", str(args.threads), "--memory-of", row["name"]]
    try:
        return row | memory.in_fresh_process("benchmarks.step", options)
    except Exception as error:
        return row | {"memory_reason": tables.reason(error)}


def memory_of(name: str, subject: Subject) -> None:
    """In a fresh process: the peaks of one variant."""

    def build() -> Any:
        step = VARIANTS[name].make(subject)
        step.run()  # compiles
        return step.run

    memory.answer(memory.peaks(build))


# --- tables ---------------------------------------------------------------------------------------------------------------------------


def line(row: Row) -> list[str]:
    """A row of the Markdown table."""
    if row["status"] != "measured":
        return [row["name"], row["bits"], row["status"], "-", "-", "-", row["reason"]]
    ratio = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
    kernels = ", ".join(f"{count} x {kernel}" for kernel, count in row.get("kernels", {}).items())
    rss = f"{row['rss_mb']:.0f}" if "rss_mb" in row else "-"
    return [
        row["name"],
        row["bits"],
        f"{row['ms']:.0f}",
        ratio,
        rss,
        f"{row['error']:.2g}",
        "; ".join(filter(None, (row["note"], kernels))),
    ]


def write(records: Records, args: argparse.Namespace, limits: dict[str, Any]) -> str:
    """CSV, Markdown and chart of what is known about a model, in the order of the table of variants."""
    known = {row["name"]: row for row in records.load() if row["digest"] == digest(args)}
    rows = [known[name] for name in VARIANTS if name in known]
    spec, limit = DENOISERS[args.model], limit_of(rows, limits)
    title = f"## One step of {args.model} ({spec.reduced})\n\n{machine.describe(limits)}\n{told(rows, limit)}"
    text = tables.write(args.output, f"step-{args.model}", title, HEADINGS, rows, list(map(line, rows)))
    tables.bars(args.output / f"step-{args.model}.png", f"One step of {args.model}, {args.threads} thread(s)", rows, limit)
    return text


def limit_of(rows: Sequence[Row], limits: dict[str, Any]) -> float | None:
    """How many times faster than in eager torch a step with every product at the machine's peak would be."""
    return next((row["ms"] / 1e3 / work.least_seconds(row, limits) for row in rows if row["name"] == BASE and "ms" in row), None)


def told(rows: Sequence[Row], limit: float | None) -> str:
    """A sentence on the limit."""
    if limit is None:
        return ""
    layers, attention = rows[0]["layers_gop"], rows[0]["attention_gop"]
    return (
        f"{layers:.0f} G operations in layers, {attention:.0f} G in attention; with layers at the int8 peak, attention at the {BASE} peak "
        f"and all else free a step would be {limit:.2f} times as fast as eager {BASE}"
    )


def digest(args: argparse.Namespace) -> str:
    """Rows of one table belong to the same model and number of threads."""
    return f"{args.model}-{args.threads}"


# --- command line ---------------------------------------------------------------------------------------------------------------------


def selected(only: str | None) -> list[str]:
    """Names of variants that match one of the patterns, separated by semicolons.

    Raises:
        SystemExit: if a pattern matches none.
    """
    patterns = [part.strip() for part in (only or "*").split(";")]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in VARIANTS):
            raise SystemExit(f"no variant matches '{pattern}'; there are: {'; '.join(VARIANTS)}")
    return [name for name in VARIANTS if name != BASE and any(fnmatch(name, pattern) for pattern in patterns)]


def options() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--model", choices=DENOISERS, default="wan-1.3b")
    made.add_argument("--only", help="names or patterns of variants, separated by semicolons")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--limit", type=float, default=16, help="GB of resident memory above which variants are timed in several sets")
    made.add_argument("--no-memory", action="store_true", help="skip the fresh processes that measure memory")
    made.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    made.add_argument("--work", type=Path, default=Path("runs/speed"), help="checkpoints and exported graphs, made once")
    made.add_argument("--table", action="store_true", help="only write the table and chart from what is there")
    made.add_argument("--memory-of", help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Parse the command line, measure, write."""
    args = options().parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    subject, records = Subject(args.model, args.work), Records(args.output / "step.jsonl")
    if args.memory_of:
        return memory_of(args.memory_of, subject)
    limits = machine.known(args.output, args.threads)
    if not args.table:
        reference, done = work.counted(VARIANTS[REFERENCE].make(subject).run)
        for rows, works in batches(selected(args.only), subject, reference, args.limit * 1e9):
            for row in timed(rows, works, args.rounds, args.threads):
                row = row if args.no_memory else with_memory(row, args)
                records.add(row | done | {"digest": digest(args), "threads": args.threads, "torch": torch.__version__})
                print("  " + "  ".join(line(row)), flush=True)
    print(write(records, args, limits))
    return None


if __name__ == "__main__":
    main()
