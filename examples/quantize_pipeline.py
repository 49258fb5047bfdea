"""Quantize a diffusers pipeline from Python with prompts of your own, save it, and open it again with stock diffusers.

python examples/quantize_pipeline.py
python examples/quantize_pipeline.py --pipeline path/to/pipeline --recipe qvd-w8a8 --prompts 16 --steps 50 --frames 81 --size 480 832
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import reelquant

PROMPTS = [
    "a red circle moves left to right",
    "a green square moves up",
    "a blue triangle stands still",
    "the digit 7 moves down",
]  # texts of the kind that you sample with: motions and subjects differ


def main() -> None:
    """Quantize, save, open, compare one clip."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="tiny-dit", help="bundled name, folder, hub id, or FILE@PIPELINE")
    parser.add_argument("--recipe", default="minmax-w8a8", help="a name from `reelquant recipes`, or a YAML file")
    parser.add_argument("--prompts", type=int, default=2, help="how many texts to calibrate on; recipes ask for 16")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of calibration and of the clip")
    parser.add_argument("--frames", type=int, default=13, help="of a clip")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--output", type=Path, help="folder to write; a temporary one if it is left out")
    wanted = parser.parse_args()

    pipe = reelquant.open_pipeline(wanted.pipeline)
    height, width = wanted.size
    call = {"num_inference_steps": wanted.steps, "num_frames": wanted.frames, "height": height, "width": width}
    before = pipe(PROMPTS[3], **call, output_type="pt", generator=torch.manual_seed(0)).frames

    report = reelquant.quantize(pipe, wanted.recipe, PROMPTS, overrides={"calibrate.prompts": wanted.prompts}, **call)
    print(f"{len(report.layers)} layers, {report.ratio:.1f} times smaller than float32; kernel: {report.kernel}")

    with tempfile.TemporaryDirectory() as scratch:
        folder = reelquant.save(pipe, wanted.output or Path(scratch) / "out", report)
        again = DiffusionPipeline.from_pretrained(folder)  # stock diffusers, after `import reelquant`
        after = again(PROMPTS[3], **call, output_type="pt", generator=torch.manual_seed(0)).frames
    error = float(((after - before) ** 2).mean())
    print(f"PSNR of one clip to float, {wanted.steps} steps: {-10 * torch.log10(torch.tensor(error)).item():.1f} dB")


if __name__ == "__main__":
    main()
