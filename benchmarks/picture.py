"""The picture of the README: one clip of each bundled pipeline, in float and quantized.

    python -m benchmarks.picture --output docs/pictures

Rows are frames of one caption and one noise; recipes are applied as a user would. The file is ``clips.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import reelquant
from benchmarks.common import SAMPLING_SEED, weight_bytes
from reelquant.discover import denoiser_of
from reelquant.models.sampling import sample
from reelquant.models.shapes import evaluation_prompts

CLIPS = {"tiny-dit": 5, "tiny-unet": 1}
"""Number of the evaluation caption that is shown, by pipeline."""
RECIPES = ("qvd-w8a8", "reel-w4a8", "reel-w4a4")
FRAMES = 6


def rows(model: str, clip: int) -> tuple[str, dict[str, Tensor]]:
    """The caption, and frames by what made them."""
    caption, found = evaluation_prompts(clip + 1)[clip], {}
    for recipe in (None, *RECIPES):
        pipe = reelquant.open_pipeline(model)
        if recipe is not None:
            reelquant.quantize(pipe, recipe)
        size = weight_bytes(denoiser_of(pipe)[1]) / 1e6
        frames = sample(pipe, [caption], seed=SAMPLING_SEED + clip)[0].float().clamp(0, 1)
        chosen = torch.linspace(0, len(frames) - 1, FRAMES).round().long()
        found[f"{recipe or 'float32'}\n{size:.1f} MB"] = frames[chosen]
    return caption, found


def main() -> None:
    """Parse the command line, sample, draw."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--output", type=Path, default=Path("docs/pictures"))
    args = made.parse_args()
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for part, (model, clip) in zip(figure.subfigures(1, len(CLIPS)), CLIPS.items(), strict=True):
        caption, found = rows(model, clip)
        part.suptitle(f"{model}: {caption}", fontsize=8)
        for line, (label, frames) in zip(part.subplots(len(found), FRAMES), found.items(), strict=True):
            for axis, frame in zip(line, frames, strict=True):
                axis.imshow(frame.permute(1, 2, 0).numpy(), interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
            line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    args.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output / "clips.png", dpi=90)


if __name__ == "__main__":
    main()
