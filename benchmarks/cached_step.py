"""A denoiser step whose blocks are reused, beside a full one, at true width: time, and the memory of what is kept.

    python -m benchmarks.cached_step --model wan-1.3b-deep --output benchmarks/results

Random weights, quantized to 8 bits without data (``quarot-w8a8``), one thread; steps in turns, medians. Timesteps fall by one from
call to call, so all calls belong to one trajectory, and the schedule computes every second of them. The file is ``cached-step.md``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import reelquant
from benchmarks.common import markdown
from benchmarks.speed.denoisers import DENOISERS, Denoiser, Sampler
from reelquant.discover import discover
from reelquant.reuse import BlockReuse
from reelquant.tuning.recording import Site, reusing

TOKENS = {"wan-1.3b-deep": 32_760, "wan-14b-deep": 32_760}
"""Of a clip of 81 frames in 480p."""
HEADINGS = (
    "model",
    "order",
    "results kept in",
    "full step, s",
    "reused step, s",
    "full over reused",
    "kept at this size, MB",
    "kept at full size, GB",
)


def kept_bytes(installed: Any) -> int:
    """Of all results that the running trajectory holds."""
    return sum(history.bytes for history in installed.stretches[0].now.trajectory.histories.values())


def quantized(spec: Denoiser) -> Site:
    """The denoiser in 8 bits."""
    denoiser = spec.make()
    reelquant.quantize(Sampler(spec, denoiser), "quarot-w8a8")
    return Site(denoiser, "denoiser", discover(denoiser))


@torch.no_grad()
def row(model: str, site: Site, order: int, rounds: int, *, rounded: bool) -> list[str]:
    """Full and reused steps in turns."""
    spec, denoiser = DENOISERS[model], site.denoiser
    spent: dict[str, list[float]] = {"computed": [], "reused": []}
    stage = BlockReuse(every=2, first=order + 1, stretch=(0.0, 1.0), order=order, rounded=rounded)
    with reusing(site, stage) as installed:
        latent = spec.inputs(denoiser, torch.float32)["hidden_states"]
        for number in range(order + 1 + 2 * rounds):
            given = spec.inputs(denoiser, torch.float32, timestep=900.0 - number, latent=latent)
            before, began = installed.counts()["reused"], time.perf_counter()
            denoiser(**given)
            spent["reused" if installed.counts()["reused"] > before else "computed"].append(time.perf_counter() - began)
        kept = kept_bytes(installed)
        tokens = next(iter(installed.stretches[0].now.trajectory.histories.values())).last[0].shape[1]
    full, reused = (statistics.median(spent[kind]) for kind in ("computed", "reused"))
    whole = kept / tokens * TOKENS[model] / 1e9
    numbers = [f"{full:.1f}", f"{reused:.3f}", f"{full / reused:.0f}", f"{kept / 1e6:.1f}", f"{whole:.2f}"]
    found = [f"{model}, {spec.reduced}", str(order), "int8" if rounded else "float32", *numbers]
    print(", ".join(found), flush=True)
    return found


def main() -> None:
    """Parse the command line, measure, write the table."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--model", choices=list(TOKENS), default="wan-1.3b-deep")
    made.add_argument("--orders", type=int, nargs="*", default=[0, 1])
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--output", type=Path, default=Path("runs"))
    args = made.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    site = quantized(DENOISERS[args.model])
    rows = [row(args.model, site, order, args.rounds, rounded=rounded) for order in args.orders for rounded in (False, True)]
    text = markdown(HEADINGS, rows)
    note = "Kept: results of one call a step; guidance in two calls keeps twice as much. Full size: 81 frames in 480p, 32,760 tokens.\n"
    (args.output / "cached-step.md").write_text(f"{note}\n{text}")
    print(text)


if __name__ == "__main__":
    main()
