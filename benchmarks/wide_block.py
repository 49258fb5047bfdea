"""Reconstruction of one block of the true width of a large model: what it takes, beside what a dry run says before it starts.

    python -m benchmarks.wide_block --model wan-14b --output benchmarks/results

One block with random weights learns the rounding of its 4-bit weights (``brecq-w4a8`` with few iterations). A dry run counts calls of the
denoiser; here they are held against the processor time that reconstruction took, in units of a float call of
the same denoiser. Both grow with the number of blocks alone. The file is ``wide-block.md``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import reelquant
from benchmarks.common import markdown
from benchmarks.speed.denoisers import DENOISERS, Sampler
from benchmarks.speed.memory import high_water, reset_high_water
from reelquant.recipes.recipe import Recipe, load_recipe
from reelquant.reconstruct.adaround import AdaRound
from reelquant.stages import BlockWork

CALLS = 4
HEADINGS = (
    "model",
    "weights of the block",
    "iterations",
    "float call, CPU s",
    "said: calls",
    "took: calls",
    "peak memory, GB",
    "held-out error fell",
)


@dataclass
class Watch:
    """What reconstruction did.

    Attributes:
        seconds: processor time.
        kept: whether what was learned lowered the error on held-out calls.
    """

    seconds: float = 0.0
    kept: bool = False


def recipe(iterations: int) -> Recipe:
    """``brecq-w4a8`` with few iterations on few calls."""
    learn = {"reconstruct": "adaround", "scope": "block", "iterations": iterations, "calls": CALLS, "on": "role:main"}
    steps = [{"solve": "nearest", "correct_bias": True, "on": "role:main"}, learn]
    calibrate = {"prompts": CALLS // 2, "steps": 2, "probes": 0}
    return load_recipe({"extends": "brecq-w4a8", "name": "wide block", "steps": steps, "calibrate": calibrate, "search": {"prompts": 1}})


def call_seconds(sampler: Sampler, denoiser: Any) -> float:
    """Processor time of one float call, the second one."""
    with torch.no_grad():
        for _ in range(2):
            start = time.process_time()
            denoiser(**sampler.spec.inputs(denoiser, torch.float32))
    return time.process_time() - start


@contextmanager
def watched() -> Iterator[Watch]:
    """Inside, the processor time of reconstruction and the errors on held-out calls around it are kept."""
    seen, original = Watch(), AdaRound.solve_block

    def solve(stage: AdaRound, block: BlockWork) -> Any:
        start = time.process_time()
        found = original(stage, block)
        seen.seconds += time.process_time() - start
        seen.kept = bool(found)
        return found

    AdaRound.solve_block = solve
    try:
        yield seen
    finally:
        AdaRound.solve_block = original


def measure(name: str, iterations: int) -> list[str]:
    """One row."""
    spec = DENOISERS[name]
    denoiser = spec.make()
    sampler, chosen = Sampler(spec, denoiser), recipe(iterations)
    weights = sum(parameter.numel() for parameter in denoiser.blocks[0].parameters())
    once = call_seconds(sampler, denoiser)
    reset_high_water()
    with watched() as seen:
        report = reelquant.quantize(sampler, chosen, prompts=["a"] * (CALLS + 1))
    said = next(entry.stage for entry in chosen.entries if entry.stage.records).own_calls(len(report.layers))
    took, peak = f"{seen.seconds / once:.0f}", f"{high_water() / 1e9:.1f}"
    return [name, f"{weights / 1e6:.0f} M", str(iterations), f"{once:.1f}", str(said), took, peak, "yes" if seen.kept else "no"]


def main() -> None:
    """Parse the command line, measure, write the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="wan-14b", choices=[name for name in DENOISERS if name.startswith("wan")])
    made.add_argument("--iterations", type=int, default=20)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    text = markdown(HEADINGS, [measure(args.model, args.iterations)])
    (args.output / "wide-block.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
