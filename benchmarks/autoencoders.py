"""What quantizing the VAE of a bundled pipeline costs, beside what the VAE itself loses.

    python -m benchmarks.autoencoders --pipeline tiny-dit --recipes w8a16 minmax-w8a8 qvd-w8a8 --clips 8

The denoiser stays float, so both VAEs decode the same latents. *decoded* is the PSNR of clips of evaluation captions to those that
the float VAE makes of the same latents, *own loss* that of drawn clips, encoded and decoded by the float VAE, to the drawn ones, *with
it* the same by the quantized VAE.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import reelquant
from benchmarks.common import Clips
from reelquant.evidence import psnr
from reelquant.models.parts import round_trip
from reelquant.models.shapes import random_clip

FIRST = 950_000_000  # seed of the first drawn clip; training never came here


def drawn(count: int, frames: int) -> Tensor:
    """Clips ``[count, frames, 3, 64, 64]`` in [0, 1] of the world that the bundled pipelines show."""
    return torch.stack([random_clip(FIRST + i, frames=frames)[0] for i in range(count)])


def rebuilt(vae: Any, clips: Tensor) -> Tensor:
    """Encoded and decoded."""
    made = [round_trip(vae, clip.movedim(1, 0)[None] * 2 - 1)[0].movedim(1, 0) for clip in clips]
    return ((torch.stack(made) + 1) / 2).clamp(0, 1)


def main() -> None:
    """Print a row per recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="tiny-dit")
    parser.add_argument("--recipes", nargs="+", default=["w8a16", "minmax-w8a8"])
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8, help="captions to calibrate on")
    options = parser.parse_args()
    clips = Clips(options.pipeline, options.clips)
    pipe = clips.open()
    reference = clips.frames(pipe)
    real = drawn(options.clips, reference.shape[1])
    own = psnr(real, rebuilt(pipe.vae, real))
    print("| recipe | quantized layers | decoded, mean dB | worst clip | own loss, dB | with it, dB |\n|---|---|---|---|---|---|")
    for recipe in options.recipes:
        pipe = clips.open()
        overrides = {} if recipe.endswith("a16") else {"calibrate.prompts": options.prompts}
        report = reelquant.quantize(pipe, {"vae": recipe}, overrides=overrides)
        decoded, after = psnr(reference, clips.frames(pipe)), psnr(real, rebuilt(pipe.vae, real))
        figures = (float(decoded.mean()), float(decoded.min()), float(own.mean()), float(after.mean()))
        print(f"| `{recipe}` | {len(report.layers)} | " + " | ".join(f"{one:.1f}" for one in figures) + " |")


if __name__ == "__main__":
    main()
