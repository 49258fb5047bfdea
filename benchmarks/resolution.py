"""Schedules of sizes: tokens saved, what the judge sees, the distance to the same pipeline without, and the time of both in turns.

Run it from the repository root::

    python -m benchmarks.resolution --pipeline tiny-dit --clips 64 --output benchmarks/results
    python -m benchmarks.resolution --pipeline tiny-unet --clips 64 --output benchmarks/results

The pipeline is quantized with ``qvd-w8a8`` at its own size; ``calibrated with it`` is the row whose calibration followed the schedule.
Every schedule is held against the pipeline as it is, from the same noise; a few clips of both are sampled in turns for their CPU times.
Clips of twice the size are held against clips that the pipeline samples at that size at once. Rows of ``float at`` are clips of the
float pipeline that are sampled at a smaller size from the first step to the last, and enlarged for the judge: no schedule that rests on
that size alone can see more. Rows that are already in the output are not measured again; the quantized pipeline is kept in ``runs/tuned``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import reelquant
from benchmarks.common import SAMPLING_SEED, Clips, Records, denoiser, judged, markdown, measure, parser
from benchmarks.tuned import KEPT, RECIPE, quantized
from reelquant.models.sampling import call_arguments, sample
from reelquant.policies import ChangeResolution, put_resolution
from reelquant.recipes.recipe import load_recipe

Stages = Sequence[Mapping[str, float]]


def three(first: float, middle: float, scale: float, **last: float) -> Stages:
    """Full size, another one, full size again."""
    return [{"share": first}, {"share": middle, "scale": scale}, {"share": round(1 - first - middle, 3)} | last]


def spread(hold: float) -> Stages:
    """Eight of 20 steps at full size, spread over the trajectory, and small ones between them, from the noise that the clip has."""
    stages: list[Mapping[str, float]] = [{"share": 0.15}]
    for small in (0.1, 0.1, 0.1, 0.15, 0.15):
        stages += [{"share": small, "scale": 0.5, "noise": 1.0}, {"share": 0.05, "details": 1.0, "hold": hold, "noise": 1.0}]
    return stages


SCHEDULES: dict[str, Stages] = {
    "one size in three stages": three(0.2, 0.6, 1.0),
    "bottleneck 0.5": three(0.2, 0.6, 0.5),
    "bottleneck 0.75": three(0.2, 0.6, 0.75),
    "bottleneck 0.5, short": three(0.3, 0.3, 0.5),
    "bottleneck 0.75, short": three(0.3, 0.4, 0.75),
    "early 0.75": three(0.05, 0.55, 0.75),
    "early 0.5": three(0.05, 0.35, 0.5),
    "bottleneck 0.5, details": three(0.2, 0.6, 0.5, details=1.0),
    "late 0.5": three(0.35, 0.6, 0.5),
    "late 0.5, details": three(0.35, 0.6, 0.5, details=1.0),
    "late 0.5, details, half held": three(0.35, 0.6, 0.5, details=1.0, hold=0.5),
    "late 0.5, details, all held": three(0.35, 0.6, 0.5, details=1.0, hold=1.0),
    "spread 0.5, details, half held, its noise": spread(0.5),
    "spread 0.5, details, all held, its noise": spread(1.0),
    "late 0.75, details": three(0.25, 0.7, 0.75, details=1.0),
    "early 0.5, last part from more noise": three(0.05, 0.55, 0.5, restart=0.7),
}
LARGER: dict[str, Stages] = {
    "diffuse-high": [{"share": 0.6}, {"share": 0.4, "scale": 2.0, "restart": 0.4, "guide": 0.5}],
    "diffuse-high, no guidance": [{"share": 0.6}, {"share": 0.4, "scale": 2.0, "restart": 0.4}],
}
SMALLER: dict[str, tuple[float, float]] = {
    f"float at {height:g} x {width:g}": (height, width) for height, width in ((1, 1), (0.75, 0.75), (0.5, 1), (0.5, 0.5))
}
"""Height and width over those of the call."""
TRAINED = "bottleneck 0.5, calibrated with it"
FLOAT = "float"
HEADINGS = (
    "schedule",
    "tokens, times fewer",
    "time, times shorter",
    "PSNR to no schedule, dB (95 %)",
    "judge: motion, shape, digit, colour",
    "all that texts say, points to no schedule",
)
TIMED = 8
"""Clips of every row that are sampled in turns with no schedule, for the times."""


def judge_words(judge: Mapping[str, float]) -> str:
    """The kinds that a caption states and that a schedule may lose."""
    return ", ".join(f"{judge[kind]:.2f}" if kind in judge else "-" for kind in ("motion", "shape", "digit", "color"))


def sampled(pipe: Any, clips: Clips, stages: Stages | None) -> Tensor:
    """Clips by a schedule, or without."""
    model = denoiser(pipe)[1]
    put_resolution(model, None if stages is None else ChangeResolution(tuple(stages)))
    try:
        return clips.frames(pipe)
    finally:
        put_resolution(model, None)


def shorter(pipe: Any, clips: Clips, stages: Stages) -> float:
    """CPU time without a schedule over that with it, of some clips in turns."""
    seconds = [0.0, 0.0]
    few = replace(clips, count=clips.batch)
    for _ in range(max(min(TIMED, clips.count) // clips.batch, 1)):
        for which, schedule in enumerate((None, stages)):
            began = time.process_time()
            sampled(pipe, few, schedule)
            seconds[which] += time.process_time() - began
    return seconds[0] / seconds[1]


def scheduled_row(pipe: Any, clips: Clips, stages: Stages, plain: Tensor) -> dict[str, Any]:
    """A schedule beside none."""
    found = sampled(pipe, clips, stages)
    steps = call_arguments(pipe, **clips.call)["num_inference_steps"]
    fewer = ChangeResolution(tuple(stages)).fewer(steps)
    facts = {"fewer": fewer, "shorter": shorter(pipe, clips, stages), "judge_plain": judged(plain, clips.prompts)}
    if found.shape != plain.shape:
        return facts | {"judge": judged(found, clips.prompts)}
    return facts | measure(found, plain, clips.prompts)


def direct_row(pipe: Any, clips: Clips) -> dict[str, Any]:
    """Clips of twice the size, sampled at once."""
    own = call_arguments(pipe, **clips.call)
    call = clips.call | {"height": 2 * own["height"], "width": 2 * own["width"]}
    return {
        "fewer": 0.25,
        "judge": judged(sample(pipe, clips.prompts, seed=SAMPLING_SEED, batch=clips.batch, **call).float(), clips.prompts),
    }


def smaller_row(pipe: Any, clips: Clips, share: tuple[float, float]) -> dict[str, Any]:
    """Clips of a smaller size, enlarged."""
    own = call_arguments(pipe, **clips.call)
    height, width = own["height"], own["width"]
    call = clips.call | {"height": round(height * share[0]), "width": round(width * share[1])}
    frames = sample(pipe, clips.prompts, seed=SAMPLING_SEED, batch=clips.batch, **call).float()
    large = F.interpolate(frames.flatten(0, 1), size=(height, width), mode="bilinear").unflatten(0, frames.shape[:2])
    return {"fewer": 1 / (share[0] * share[1]), "judge": judged(large, clips.prompts)}


def calibrated(clips: Clips, stages: Stages) -> Any:
    """The pipeline in eight bits, calibrated with a schedule."""
    pipe = clips.open()
    reelquant.quantize(pipe, RECIPE, overrides={"resolution": stages})
    return pipe


def _seen(judge: Mapping[str, float]) -> float:
    """Share of what the texts say that the judge sees, percent: the mean over kinds."""
    return 100 * statistics.mean(judge.values())


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The measured rows."""
    lines = []
    for label, row in rows.items():
        distance = f"{row['psnr_mean']:.1f} ({row['psnr_low']:.1f} to {row['psnr_high']:.1f})" if "psnr_mean" in row else "another size"
        shorter = f"{row['shorter']:.2f}" if "shorter" in row else "-"
        points = f"{_seen(row['judge']) - _seen(row['judge_plain']):+.1f}" if "judge_plain" in row else "-"
        lines.append([label, f"{row['fewer']:.2f}", shorter, distance, judge_words(row["judge"]), points])
    plain = next((row["judge_plain"] for row in rows.values() if "judge_plain" in row), None)
    first = [["no schedule", "1.00", "1.00", "-", judge_words(plain), "-"]] if plain else []
    return markdown(HEADINGS, first + lines)


def digest_of(clips: Clips) -> str:
    """Of rows of these clips: another one than that of the recipe's own rows."""
    return f"{clips.digest}-resolution-{load_recipe(RECIPE).digest()}"


def page(clips: Clips, records: Records, labels: Sequence[str]) -> str:
    """A section for every number of clips that is measured."""
    own = [row for row in records.load() if row["name"].startswith("resolution: ") and row["pipeline"] == clips.name]
    parts = []
    for count in sorted({row["clips"] for row in own}, reverse=True):
        digest = digest_of(replace(clips, count=count))
        known = {row["name"].removeprefix("resolution: "): row for row in own if row["digest"] == digest}
        if known:
            found = table({label: known[label] for label in labels if label in known})
            parts.append(f"{clips.name}, {RECIPE}, {count} clips\n\n{found}")
    return "\n".join(parts)


def main() -> None:
    """Parse the command line, measure what is missing, write the table."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="*", help="labels of rows")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    clips = Clips(args.pipeline, args.clips, dict(args.set), args.batch)
    KEPT.mkdir(parents=True, exist_ok=True)
    records = Records(args.output / "rows.jsonl")
    digest = digest_of(clips)
    pipes: dict[str, Any] = {}
    plains: dict[str, Tensor] = {}

    makers = {
        FLOAT: clips.open,
        TRAINED: lambda: calibrated(clips, SCHEDULES["bottleneck 0.5"]),
        "": lambda: reelquant.open_pipeline(quantized(clips, KEPT)),
    }

    def pipe(label: str) -> Any:
        if label not in pipes:
            pipes[label] = makers[label]()
        return pipes[label]

    def scheduled(label: str, stages: Stages) -> dict[str, Any]:
        if label not in plains:
            plains[label] = sampled(pipe(label), clips, None)
        return scheduled_row(pipe(label), clips, stages, plains[label])

    work = {label: lambda stages=stages: scheduled("", stages) for label, stages in (SCHEDULES | LARGER).items()}
    work |= {label: lambda share=share: smaller_row(pipe(FLOAT), clips, share) for label, share in SMALLER.items()}
    work["twice the size at once"] = lambda: direct_row(pipe(""), clips)
    work[TRAINED] = lambda: scheduled(TRAINED, SCHEDULES["bottleneck 0.5"])
    for label, make in work.items():
        if args.table or records.done(f"resolution: {label}", digest) or (args.only and label not in args.only):
            continue
        facts = {"name": f"resolution: {label}", "digest": digest, "pipeline": clips.name, "clips": clips.count, "status": "measured"}
        records.add(facts | make())
        print(f"{clips.name}: {label}", flush=True)
    text = page(clips, records, list(work))
    (args.output / f"resolution-{clips.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
