"""Quantizing a pipeline whose condition is a picture: ``tiny-i2v``, which continues a first frame (training/tiny_i2v.py).

Build its folder and run this from the repository root::

    PYTHONPATH=src python training/tiny_i2v.py build --output runs/tiny-i2v/pipeline
    python -m benchmarks.first_frame --folder runs/tiny-i2v/pipeline --clips 64 --output benchmarks/results

Calibration and evaluation take captions with the first frame of a clip that shows them, from seeds that no training saw, and different
ones. Clips of the quantized pipeline are held against those of the float one. Rows that are already in the output are not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import reelquant
from benchmarks.common import SAMPLING_SEED, Records, markdown, measure
from reelquant.models.sampling import sample
from reelquant.models.shapes import random_clip
from reelquant.recipes.recipe import load_recipe

CALIBRATION, EVALUATION = 910_000_000, 920_000_000  # seeds of the clips whose first frames are the pictures
TEXTS = 20  # 16 calibrate, the others are held out
FRAMES = 13
RECIPES = ("qvd-w8a8", "minmax-w8a8", "qvd-w4a8")
HEADINGS = ("recipe", "PSNR to float, dB (95 %)", "worst clip, dB", "check, dB", "judge: motion, shape")


def conditions(seed: int, count: int) -> tuple[list[str], list[Image.Image]]:
    """Captions, and the first frame of a clip that each describes."""
    drawn = [random_clip(seed + i, frames=FRAMES)[:2] for i in range(count)]
    pictures = [Image.fromarray((clip[0].permute(1, 2, 0) * 255).round().byte().numpy()) for clip, _ in drawn]
    return [caption for _, caption in drawn], pictures


def clips_of(pipe: Any, captions: list[str], pictures: list[Image.Image]) -> Tensor:
    """``[clips, frames, 3, height, width]`` in [0, 1], with the pipeline's own settings."""
    return sample(pipe, captions, seed=SAMPLING_SEED, image=pictures).float()


def digest(folder: Path, clips: int, recipe: str) -> str:
    """Changes with the weights, the number of clips and the recipe."""
    weights = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))))
    return f"{weights.hexdigest()[:12]}-{clips}-{load_recipe(recipe).digest()}"


def row(folder: Path, recipe: str, captions: list[str], pictures: list[Image.Image], reference: Tensor) -> dict[str, Any]:
    """Quantize with pictures as conditions, and hold clips of other pictures against float."""
    pipe = reelquant.open_pipeline(folder)
    texts, images = conditions(CALIBRATION, TEXTS)
    report = reelquant.quantize(pipe, recipe, texts, image=images)
    facts = {"check": report.latent_psnr, "check_worst": report.latent_psnr_worst, "warnings": report.warnings}
    return facts | measure(clips_of(pipe, captions, pictures), reference, captions)


def table(rows: dict[str, dict[str, Any]], clips: int) -> str:
    """The measured rows."""
    lines = [
        [
            recipe,
            f"{one['psnr_mean']:.1f} ({one['psnr_low']:.1f} to {one['psnr_high']:.1f})",
            f"{min(one['psnr']):.1f}",
            f"{one['check']:.1f} ({one['check_worst']:.1f})",
            f"{one['judge']['motion']:.2f}, {one['judge']['shape']:.2f}",
        ]
        for recipe, one in rows.items()
    ]
    return f"tiny-i2v, {clips} clips, each from a caption and its first frame\n\n{markdown(HEADINGS, lines)}"


def main() -> None:
    """Parse the command line, measure what is missing, write the table."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--folder", type=Path, required=True, help="pipeline folder that training/tiny_i2v.py built")
    made.add_argument("--clips", type=int, default=64)
    made.add_argument("--recipes", nargs="*", default=list(RECIPES))
    made.add_argument("--output", type=Path, default=Path("runs/first-frame"))
    args = made.parse_args()
    torch.set_num_threads(1)
    records, reference = Records(args.output / "rows.jsonl"), None
    captions, pictures = conditions(EVALUATION, args.clips)
    keys = {recipe: (f"first frame: {recipe}", digest(args.folder, args.clips, recipe)) for recipe in args.recipes}
    for recipe, (name, key) in keys.items():
        if records.done(name, key):
            continue
        reference = clips_of(reelquant.open_pipeline(args.folder), captions, pictures) if reference is None else reference
        found = row(args.folder, recipe, captions, pictures, reference)
        records.add({"name": name, "digest": key, "pipeline": "tiny-i2v", "clips": args.clips, "status": "measured"} | found)
        print(f"{name}: {found['psnr_mean']:.1f} dB, worst {min(found['psnr']):.1f}", flush=True)
    known = {(one["name"], one["digest"]): one for one in records.load()}
    text = table({recipe: known[key] for recipe, key in keys.items() if key in known}, args.clips)
    (args.output / "first-frame.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
