"""What calibration costs over plain sampling of the same clips: seconds and peak memory, each measured in a fresh process.

    python -m benchmarks.calibration --pipeline tiny-unet --recipe qvd-w4a8 --prompts 4 16 64 --set num_inference_steps=8

*peak* is the high-water mark of resident pages (``VmHWM``) of the whole process, interpreter and libraries included, when sampling ends.
*calibrate* stops as soon as the statistics are complete: no layer is built. It samples the same clips, no probes. It should not need
more memory for more prompts. Seconds are processor time of one thread, so that other work on the machine does not distort the ratio.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import number
from benchmarks.speed import memory, tables
from benchmarks.speed.tables import Row

SEED = 1000  # of the first clip, as in the recipes
HEADINGS = ("prompts", "sampling, s", "calibrating, s", "ratio", "sampling, peak MB", "calibrating, peak MB")


class _Calibrated(Exception):  # noqa: N818
    """Raised to stop quantization where calibration ends."""


class Watch:
    """Progress of a quantization: times the phase ``calibrate`` and stops at the next one."""

    def __init__(self) -> None:
        self.started: float | None = None
        self.seconds = 0.0

    def phase(self, name: str, total: int) -> None:
        """A phase begins."""
        if self.started is not None:
            self.seconds = time.process_time() - self.started
            raise _Calibrated
        if name == "calibrate":
            self.started = time.process_time()

    def advance(self) -> None:
        """A step of the phase is done."""


def prompts_of(count: int) -> list[str]:
    """As many texts as asked for: evaluation captions, which every bundled pipeline understands."""
    from reelquant.models.shapes import evaluation_prompts

    return evaluation_prompts(count + 1)  # one is left for the final check of a quantization


def sampling(pipe: Any, recipe: str, count: int, call: dict[str, Any]) -> float:
    """Processor seconds of plain sampling, with as many clips at a time as calibration takes."""
    from reelquant.models.sampling import sample
    from reelquant.recipes.recipe import load_recipe

    calibrate = load_recipe(recipe, overrides={"calibrate.prompts": count}).calibrate
    batch = 4 if calibrate is None else calibrate.batch
    start = time.process_time()
    sample(pipe, prompts_of(count)[:count], seed=SEED, batch=batch, output="latent", **call)
    return time.process_time() - start


def calibrating(pipe: Any, recipe: str, count: int, call: dict[str, Any]) -> float:
    """Processor seconds of calibration."""
    import reelquant

    watch = Watch()
    try:
        reelquant.quantize(
            pipe, recipe, prompts_of(count), overrides={"calibrate.prompts": count, "calibrate.probes": 0}, progress=watch, **call
        )
    except _Calibrated:
        return watch.seconds
    raise RuntimeError(f"recipe '{recipe}' does not calibrate; choose a static recipe, for example qvd-w8a8")


WORK: dict[str, Callable[[Any, str, int, dict[str, Any]], float]] = {"sampling": sampling, "calibrating": calibrating}


def child(work: str, pipeline: str, recipe: str, count: int, call: dict[str, Any]) -> None:
    """In a fresh process: one measurement."""
    from reelquant.models.pipelines import open_pipeline

    seconds = WORK[work](open_pipeline(pipeline), recipe, count, call)
    memory.answer({f"{work}_s": round(seconds, 1), f"{work}_mb": round(memory.high_water() / memory.MB)})


def line(row: Row) -> list[str]:
    """A row of the table."""
    ratio = row["calibrating_s"] / row["sampling_s"]
    return [
        str(row["prompts"]),
        f"{row['sampling_s']:.0f}",
        f"{row['calibrating_s']:.0f}",
        f"{ratio:.2f}",
        f"{row['sampling_mb']}",
        f"{row['calibrating_mb']}",
    ]


def measure(arguments: argparse.Namespace, count: int) -> Row:
    """Sampling and calibration with so many prompts."""
    call = [f"{key}={value}" for key, value in arguments.set]
    options = ["--pipeline", arguments.pipeline, "--recipe", arguments.recipe, "--set", *call, "--prompts", str(count)]
    row: Row = {"name": str(count), "prompts": count}
    for work in WORK:
        row |= memory.in_fresh_process("benchmarks.calibration", [*options, "--child", work], timeout=7200)
    return row


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", default="tiny-unet")
    parser.add_argument("--recipe", default="qvd-w4a8")
    parser.add_argument("--prompts", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--set", type=number, nargs="*", default=[], metavar="KEY=NUMBER", help="arguments of the pipeline call")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--child", choices=WORK, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Parse the command line, measure, write."""
    arguments = parse()
    torch.set_num_threads(1)
    if arguments.child:
        return child(arguments.child, arguments.pipeline, arguments.recipe, arguments.prompts[0], dict(arguments.set))
    rows: list[Row] = []
    for count in arguments.prompts:
        rows.append(measure(arguments, count))
        print("  ", rows[-1], flush=True)
    settings = ", ".join(f"{key}={value}" for key, value in arguments.set)
    title = f"## Calibration of {arguments.pipeline} with {arguments.recipe}" + f" ({settings})" * bool(settings)
    print(tables.write(arguments.output, f"calibration-{arguments.pipeline}", title, HEADINGS, rows, [line(row) for row in rows]))
    return None


if __name__ == "__main__":
    main()
