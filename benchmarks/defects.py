"""Which figure sees which defect, and which gate stops it: every planted defect against every metric, on real and rendered clips.

    python -m benchmarks.defects --clips DIR --weights weights --output runs/defects

``--clips`` is a folder of real clips; as many rendered ones are added. Each defect is planted in all of them, and the folder is compared
with the untouched one as a user would do it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import markdown
from reelquant.evidence import gate
from reelquant.evidence.clips import find_clips
from reelquant.evidence.defects import CALLED, OVER_TIME, PLANT
from reelquant.evidence.media import write_video
from reelquant.evidence.metrics import METRICS
from reelquant.evidence.reading import read_video
from reelquant.evidence.run import Options, compare
from reelquant.models.shapes import random_clip

FRAMES, SIDE = 13, 64
MOVES = 5e-5  # motion energy from which a clip moves: defects over time are no defects of one that stands still
SHOWN = (
    "psnr", "ssim", "lpips_alex", "color_shift", "motion_deviation", "tempo", "dropped", "flicker_deviation", "grain_deviation",
    "checkerboard_deviation", "sharpness_deviation", "black_frames", "warping_error_dis", "frame_consistency", "fvd", "fid",
)  # fmt: skip


def recompressed(folder: Path) -> Callable[[Tensor], Tensor]:
    """H.264 at crf 12, as people share clips."""

    def change(clip: Tensor) -> Tensor:
        (file,) = write_video(clip, folder / "shared.mp4")
        return read_video(file)

    return change


def harmless(folder: Path) -> dict[str, Callable[[Tensor], Tensor]]:
    """Harmless changes, which must not be reported."""
    noise = torch.Generator().manual_seed(0)
    return {
        "no change": lambda clip: clip,
        "noise at 40 dB": lambda clip: (clip + 0.01 * torch.randn(clip.shape, generator=noise)).clamp(0, 1),
        "H.264, crf 12": recompressed(folder),
        "bfloat16": lambda clip: clip.bfloat16().float(),
        "1 % of contrast": lambda clip: (1.01 * clip).clamp(0, 1),
    }


def small(clip: Tensor) -> Tensor:
    """The middle square, at 64x64, and at most 13 frames."""
    side = min(clip.shape[-2:])
    top, left = (clip.shape[-2] - side) // 2, (clip.shape[-1] - side) // 2
    square = clip[:FRAMES, :, top : top + side, left : left + side]
    return F.interpolate(square, (SIDE, SIDE), mode="bilinear", antialias=True).clamp(0, 1)


def material(folder: Path, count: int) -> dict[str, Tensor]:
    """Real clips, evenly spaced in their folder, and as many rendered ones."""
    found = find_clips(folder)
    names = list(found)[:: max(1, len(found) // count)][:count]
    real = {name: small(found[name].read()) for name in names}
    return {name: clip for name, clip in real.items() if len(clip) == FRAMES} | {
        f"shape-{i:02d}": random_clip(70_000 + i)[0] for i in range(count)
    }


def moving(clips: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those that move."""
    from reelquant.evidence.temporal import motion_energy

    return {name: clip for name, clip in clips.items() if float(motion_energy(clip).mean()) > MOVES}


def measure(name: str, change: Callable[[Tensor], Tensor], clips: dict[str, Tensor], args: Any) -> dict[str, Any]:
    """Figures of one change and what the gates say."""
    root = args.output / name.replace(" ", "-").replace(",", "")
    for clip, frames in clips.items():
        for folder, shown in (("reference", frames), ("test", change(frames))):
            if not (root / folder / f"{clip}.mp4").is_file():
                write_video(shown, root / folder / f"{clip}.mp4", lossless=True)
    options = Options(
        (",".join(SHOWN),), root / "evaluation", args.weights, gate="default", fid_frames=4, resume=(root / "evaluation").is_dir(), shown=0
    )
    made = compare(root / "test", root / "reference", options=options)
    values = {metric: result.interval.mean for metric, result in made.metrics.items() if result.interval}
    own = {metric: result.reference for metric, result in made.metrics.items() if result.reference is not None}
    verdicts = {preset: gate.decide(values, {}, made.data["defects"], len(clips), preset).passed for preset in gate.GATES}
    expected = CALLED.get(name, name)
    named = next((len(found["clips"]) for found in made.data["defects"] if found["name"] == expected), 0)
    return {"name": name, "clips": len(clips), "named": named, "values": values, "reference": own, "passes": verdicts,
            "defects": {found["name"]: len(found["clips"]) for found in made.data["defects"]}}  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A row per change."""

    def cell(row: dict[str, Any], metric: str) -> str:
        return f"{row['values'][metric]:.{METRICS[metric].digits}f}" if metric in row["values"] else ""

    def verdict(row: dict[str, Any]) -> str:
        stopped = [preset for preset, passed in row["passes"].items() if not passed]
        return ", ".join(stopped) or "none"

    heads = ["change", "clips", "named", "stopped by", *(METRICS[metric].title for metric in SHOWN)]
    return markdown(
        heads, [[row["name"], str(row["clips"]), str(row["named"]), verdict(row), *(cell(row, metric) for metric in SHOWN)] for row in rows]
    )


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--clips", type=Path, required=True, help="folder of real clips")
    made.add_argument("--count", type=int, default=12, help="real clips, and as many rendered ones")
    made.add_argument("--weights", type=Path)
    made.add_argument("--output", type=Path, default=Path("runs/defects"))
    made.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    made.add_argument("--threads", type=int, default=1)
    args = made.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    clips = material(args.clips, args.count)
    rows = []
    for name, change in {**harmless(args.output), **PLANT}.items():
        rows.append(measure(name, change, moving(clips) if name in OVER_TIME else clips, args))
        print(name, rows[-1]["named"], rows[-1]["passes"], flush=True)
    (args.results / "defects.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.results / "defects.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
