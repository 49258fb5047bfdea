"""Train ``tiny-i2v``, a variant of ``tiny-dit`` that continues a given first frame: a stock WanImageToVideoPipeline of Wan 2.2's 5B kind.

Only the transformer is trained, from that of ``tiny-dit`` on; every other part is tiny-dit's own. The first latent frame is that of the
picture and has the timestep 0, the others are noisy as before (``expand_timesteps``). Stages, in this order (one core)::

    PYTHONPATH=src python training/tiny_i2v.py train --minutes 15
    PYTHONPATH=src python training/tiny_i2v.py export              # the transformer, to training/weights/tiny-i2v
    PYTHONPATH=src python training/tiny_i2v.py build --output runs/tiny-i2v/pipeline   # a whole pipeline folder
    PYTHONPATH=src python training/tiny_i2v.py evaluate --count 100
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from autoencoder import encoded
from common import (
    CURVES,
    ROOT,
    RUNS,
    TEST_SEED,
    Muon,
    averaged,
    contact_sheet,
    rounded,
    save_atomically,
    say,
    split_parameters,
    stage_parser,
)
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanTransformer3DModel
from flow import Plan, matched_noise, noise_levels, some_captions, train_flow
from PIL import Image
from plot import draw
from tiny_dit import CALL, FRAMES, TextToLatents, encode_whole, tokenize, use_whole_sequences
from torch import Tensor

from reelquant.models.judge import accuracy
from reelquant.models.pipelines import locate
from reelquant.models.sampling import sample, write_notes
from reelquant.models.shapes import covering_captions, random_clip

RUN, TRAINED = RUNS / "tiny-i2v", ROOT / "training" / "weights" / "tiny-i2v"
POOL, HELD_OUT = 4000, 64
PLAN = Plan(average=0.995, warmup=40, decay=0.6, loss=0.6, note=25, save=100)


class Data:
    """Normalized latents of tiny-dit's training clips, encoded once by its autoencoder."""

    def __init__(self, pipe: Any, seed: int):
        file = RUN / "latents.pt"
        if not file.is_file():
            save_atomically(encode_pool(pipe), file)
        self.latents, clips_seeds = torch.load(file)["latents"], range(POOL)
        self.scenes = [random_clip(clip_seed, frames=1)[2] for clip_seed in clips_seeds]
        self.tokenizer, self.generator = pipe.tokenizer, torch.Generator().manual_seed(seed)

    def batch(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents, noise, levels and tokens, drawn as for tiny-dit; noise goes to the latents that it is closest to."""
        g = self.generator
        index = torch.randint(POOL - HELD_OUT, (n,), generator=g)
        latents = self.latents[index].float()
        noise, sigma = matched_noise(latents, g), noise_levels(n, g)
        captions = some_captions([self.scenes[i] for i in index.tolist()], g)
        return latents, noise, sigma, tokenize(self.tokenizer, captions)


@torch.no_grad()
def encode_pool(pipe: Any) -> dict[str, Tensor]:
    """The clips of the seeds 0 to ``POOL``."""
    vae = use_whole_sequences(pipe.vae)
    mean, std = (torch.tensor(getattr(vae.config, f"latents_{name}")).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    latents, _ = encoded(lambda clips: (encode_whole(vae, clips)[0].float() - mean) / std, POOL, FRAMES)
    return {"latents": latents}


def levels(sigma: Tensor, latents: Tensor) -> Tensor:
    """Noise level of every latent frame, ``[n, 1, frames, 1, 1]``: 0 for the first, which is the picture."""
    level = sigma.view(-1, 1, 1, 1, 1).repeat(1, 1, latents.shape[2], 1, 1)
    level[:, :, 0] = 0
    return level


def flow_loss(model: TextToLatents, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Mean squared error of the velocity in all frames but the first."""
    latents, noise, sigma, tokens = batch
    level = levels(sigma, latents)
    tokens_a_frame = latents.shape[3] // 2 * (latents.shape[4] // 2)
    each = level[:, 0, :, 0, 0].repeat_interleave(tokens_a_frame, 1)  # a level for every token
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(latents * (1 - level) + noise * level, each, tokens)
    return (velocity - (noise - latents))[:, :, 1:].square().mean()


def train(minutes: float, seed: int = 0, resume: bool = False) -> None:
    """Train the transformer. Everything needed to go on is saved every 100 steps."""
    torch.manual_seed(seed)
    pipe = DiffusionPipeline.from_pretrained(locate("tiny-dit"), torch_dtype=torch.float32)
    data, model = Data(pipe, seed), TextToLatents()
    model.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    model.text_encoder.requires_grad_(False)
    model.transformer.load_state_dict(pipe.transformer.state_dict())
    for block in model.transformer.blocks:
        block.compile(dynamic=False)
    transformer = model.transformer
    matrices, rest = split_parameters(transformer, lambda name, p: p.ndim == 2 and name.startswith("blocks."))
    optimizers = [Muon(matrices, lr=7e-4), torch.optim.AdamW(rest, lr=5e-4, betas=(0.9, 0.98), weight_decay=0.0)]
    train_flow(transformer, optimizers, data.batch, lambda part: flow_loss(model, part), PLAN, RUN / "train.pt", minutes, resume)


def export() -> None:
    """Write the transformer in float16, and the curve."""
    transformer = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(locate("tiny-dit"), subfolder="transformer"))
    transformer.load_state_dict(averaged(RUN / "train.pt"))
    transformer.to(torch.float16).save_pretrained(TRAINED / "transformer", safe_serialization=True)
    (CURVES / "tiny-i2v.csv").write_text((RUN / "train.csv").read_text())
    draw(CURVES / "tiny-i2v.csv")


def build(output: Path) -> WanImageToVideoPipeline:
    """A whole pipeline folder: the trained transformer, everything else from ``tiny-dit``."""
    base = DiffusionPipeline.from_pretrained(locate("tiny-dit"), torch_dtype=torch.float16)
    names = ("tokenizer", "text_encoder", "vae", "scheduler")
    transformer = WanTransformer3DModel.from_pretrained(TRAINED / "transformer", torch_dtype=torch.float16)
    parts = {name: getattr(base, name) for name in names} | {"transformer": transformer, "image_encoder": None, "image_processor": None}
    pipe = WanImageToVideoPipeline(**parts, expand_timesteps=True)
    pipe.save_pretrained(output)
    write_notes(output, CALL, covering_captions(24))
    return pipe


def first_frames(seeds: range) -> tuple[list[str], list[Image.Image]]:
    """Captions, and the first frame of the clip that each describes."""
    drawn = [random_clip(seed, frames=FRAMES)[:2] for seed in seeds]
    pictures = [Image.fromarray((clip[0].permute(1, 2, 0) * 255).round().byte().numpy()) for clip, _ in drawn]
    return [caption for _, caption in drawn], pictures


def evaluate(count: int) -> None:
    """The judge on generated clips of unseen seeds, how close the first frame is to the picture, and a contact sheet."""
    pipe = build(RUN / "pipeline").to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    captions, pictures = first_frames(range(TEST_SEED + 10_000, TEST_SEED + 10_000 + count))
    start = time.perf_counter()
    clips = sample(pipe, captions, seed=0, image=pictures, **CALL).float()
    say(f"n={count} {(time.perf_counter() - start) / count:.2f} s a clip:", rounded(accuracy(clips, captions)))
    contact_sheet(clips[:12], RUN / "sheet.png", captions[:12])


def main() -> None:
    """Command line."""
    parser = stage_parser(__doc__, ("train", "export", "build", "evaluate"), RUN, minutes=15.0, count=100)
    parser.add_argument("--output", type=Path, default=RUN / "pipeline", help="folder of the whole pipeline")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stages = {
        "train": lambda: train(args.minutes, resume=args.resume),
        "export": export,
        "build": lambda: build(args.output),
        "evaluate": lambda: evaluate(args.count),
    }
    stages[args.stage]()


if __name__ == "__main__":
    main()
