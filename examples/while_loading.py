"""Quantize while stock diffusers loads a pipeline, offload it, and sample: the float model is never whole in memory.

python examples/while_loading.py
python examples/while_loading.py --pipeline path/to/pipeline --recipe w4a16 --device cuda --prompt "a dog runs on a beach"
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig

import reelquant
from reelquant.models.pipelines import locate


def main() -> None:
    """Load, offload, sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="tiny-dit", help="bundled name, folder or hub id")
    parser.add_argument("--recipe", default="w8a16", help="a recipe without data: w8a16, w4a16, quarot-w8a8 ...")
    parser.add_argument("--device", default="cpu", help="where a block is while it is computed")
    parser.add_argument("--prompt", default="a red circle moves left to right")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--frames", type=int, default=13, help="of the clip")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), metavar=("HEIGHT", "WIDTH"))
    wanted = parser.parse_args()

    config = PipelineQuantizationConfig(quant_mapping={"transformer": reelquant.ReelQuantConfig(wanted.recipe)})
    pipe = DiffusionPipeline.from_pretrained(locate(wanted.pipeline), quantization_config=config, dtype=torch.bfloat16)
    pipe.transformer.enable_group_offload(
        onload_device=torch.device(wanted.device), offload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    size, weights = pipe.transformer.get_memory_footprint() / 1e6, pipe.transformer.num_parameters() / 1e6
    print(f"transformer: {weights:.2f} million weights in {size:.2f} MB")
    height, width = wanted.size
    sizes = {"num_frames": wanted.frames, "height": height, "width": width}
    clip = pipe(wanted.prompt, num_inference_steps=wanted.steps, output_type="pt", **sizes).frames
    print(f"a clip of {clip.shape[1]} frames of {clip.shape[-1]}x{clip.shape[-2]}, finite: {bool(clip.isfinite().all())}")


if __name__ == "__main__":
    main()
