"""Are the videos still good? Full evaluation of recipes on a bundled pipeline: every figure beside the noise floor, and FVD to real clips.

    python -m benchmarks.quality --pipeline tiny-dit --clips 256 --weights weights --output runs/quality

Quantizes what is missing, renders real clips of the same world from unseen seeds, evaluates, and writes a table. The float clips and
those of the noise floor are sampled once and shared by the recipes. Can be stopped and started again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import reelquant
from benchmarks.common import markdown, parser
from reelquant.evidence.media import write_video
from reelquant.evidence.metrics import METRICS
from reelquant.models.shapes import random_clip

RECIPES = ("qvd-w8a8", "minmax-w8a8", "qvd-w4a8", "minmax-w6a6")
REAL_SEED = 9_000_000  # scenes that no training saw
FRAMES = {"tiny-unet": 9}  # I3D needs 9 frames; the pipeline's own 8 are one too few
SHOWN = (
    "psnr", "ssim", "lpips_alex", "latent_error", "motion_deviation", "flicker_deviation", "grain_deviation", "color_shift",
    "warping_error_dis", "fvd", "fvd_data", "judge",
)  # fmt: skip
KEPT = (
    "clips",
    "call",
    "test",
    "reference",
    "metrics",
    "near_lossless",
    "defects",
    "gate",
    "bias",
    "trajectory",
    "grain_growth",
    "machine",
    "versions",
)


def real_clips(folder: Path, count: int, frames: int) -> Path:
    """Rendered clips of the world the pipelines were trained on, from unseen seeds."""
    for i in range(count):
        file = folder / f"{i:04d}.mp4"
        if not file.is_file():
            write_video(random_clip(REAL_SEED + i, frames=frames)[0], file, lossless=True)
    return folder


def quantized(pipeline: str, recipe: str, folder: Path) -> Path:
    """The pipeline quantized by a recipe, made once."""
    if not folder.is_dir():
        pipe = reelquant.open_pipeline(pipeline)
        reelquant.save(pipe, folder, reelquant.quantize(pipe, recipe))
    return folder


def evaluate(pipeline: str, recipe: str, args: Any, first: Path | None) -> Path:
    """One evaluation; the folder with its report."""
    folder = args.output / f"{pipeline}-{recipe}-{args.clips}"
    frames = FRAMES.get(pipeline)
    data = real_clips(args.output / f"{pipeline}-real", args.clips, frames or 13)
    model = quantized(pipeline, recipe, args.output / f"{pipeline}-{recipe}")
    if not (folder / "report.json").is_file():
        from reelquant.evidence.run import Options
        from reelquant.evidence.run import evaluate as run

        options = Options(
            ("default", "fvd_data"), folder, args.weights, data, gate="default", resume=folder.is_dir(), reuse=first,
        )  # fmt: skip
        run(str(model), pipeline, clips=args.clips, floor=["bf16", "reseed"], batch=args.batch, options=options, num_frames=frames)
    return folder


def words(name: str, figure: dict[str, Any] | None) -> str:
    """A value with its interval."""
    if figure is None or figure["value"] is None:
        return ""
    digits = METRICS[name].digits
    value, low, high = (f"{figure[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def table(reports: dict[str, dict[str, Any]]) -> str:
    """A row per metric: recipes, then the noise floor."""
    names = list(reports)
    first = reports[names[0]]["metrics"]
    rows = []
    for name in (name for name in SHOWN if name in first):
        floors = [words(name, first[name]["floor"].get(floor)) for floor in ("bf16", "reseed")]
        marks = {True: " ✓", False: "", None: ""}
        cells = [words(name, one["metrics"][name]) + marks[one["metrics"][name]["within_floor"]] for one in reports.values()]
        own = first[name]["reference"]
        unit = f", {METRICS[name].unit}" if METRICS[name].unit else ""
        rows.append([METRICS[name].title + unit, *cells, *floors, "" if own is None else f"{own:.{METRICS[name].digits}f}"])
    return markdown(["", *names, "floor: bf16", "floor: other noise", "float itself"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__ or "")
    made.add_argument("--weights", type=Path, help="folder with the weights of I3D and LPIPS; else the cache")
    made.add_argument("--recipes", nargs="*", default=RECIPES)
    made.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = made.parse_args(argv)
    torch.set_num_threads(args.threads)
    reports: dict[str, dict[str, Any]] = {}
    first: Path | None = None
    for recipe in args.recipes:
        folder = evaluate(args.pipeline, recipe, args, first)
        first = first or folder
        reports[recipe] = json.loads((folder / "report.json").read_text())
    args.results.mkdir(parents=True, exist_ok=True)
    kept = {recipe: {key: data[key] for key in KEPT} for recipe, data in reports.items()}
    (args.results / f"quality-{args.pipeline}.json").write_text(json.dumps(kept, indent=1) + "\n")
    text = table(reports)
    (args.results / f"quality-{args.pipeline}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
