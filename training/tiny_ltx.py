"""Train ``tiny-ltx``, a third pipeline, which recipes are not tuned on: a stock LTXPipeline for the clips of ``tiny-dit``.

Another kind, width and depth than ``tiny-dit``: an LTX autoencoder with patches of 8 pixels (a latent is two frames of 16 by 16 pixels),
and a transformer of 8 blocks and 128 channels whose captions are masked. Text encoder and tokenizer are those of ``tiny-dit`` and are not
trained. Stages, in this order (one core)::

    PYTHONPATH=src python training/tiny_ltx.py vae --minutes 20
    PYTHONPATH=src python training/tiny_ltx.py latents
    PYTHONPATH=src python training/tiny_ltx.py train --minutes 39
    PYTHONPATH=src python training/tiny_ltx.py export              # autoencoder and transformer, to training/weights/tiny-ltx
    PYTHONPATH=src python training/tiny_ltx.py build --output runs/tiny-ltx/pipeline   # a whole pipeline folder
    PYTHONPATH=src python training/tiny_ltx.py evaluate --count 64
"""

from __future__ import annotations

import argparse
import math
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    CURVES,
    ROOT,
    RUNS,
    TEST_SEED,
    Clock,
    Curve,
    Ema,
    Muon,
    Training,
    averaged,
    clip_pool,
    contact_sheet,
    psnr,
    save_atomically,
    say,
)
from diffusers import AutoencoderKLLTXVideo, DiffusionPipeline, LTXPipeline, LTXVideoTransformer3DModel
from flow import Plan, matched_noise, noise_levels, some_captions, train_flow
from plot import draw, gather
from tiny_dit import FRAMES, TEXT_LENGTH, from_model, reconstruction_loss, rotate, rounded, saturation, split_parameters, to_model
from torch import Tensor, nn

from reelquant.models.judge import accuracy
from reelquant.models.pipelines import locate
from reelquant.models.sampling import sample, write_notes
from reelquant.models.shapes import Scene, covering_captions, random_clip

RUN, TRAINED = RUNS / "tiny-ltx", ROOT / "training" / "weights" / "tiny-ltx"
POOL, HELD_OUT = 8_000, 100
CALL = {"height": 64, "width": 64, "num_frames": FRAMES, "num_inference_steps": 20, "guidance_scale": 3.0}

# ------------------------------------------------------------------------------------------------------------------------- autoencoder

VAE_CONFIG = {
    "latent_channels": 32,
    "block_out_channels": (40,),
    "down_block_types": ("LTXVideoDownBlock3D",),
    "decoder_block_out_channels": (64,),
    "layers_per_block": (1, 1),
    "decoder_layers_per_block": (2, 1),
    "spatio_temporal_scaling": (True,),
    "decoder_spatio_temporal_scaling": (True,),
    "decoder_inject_noise": (False, False),
    "downsample_type": ("conv",),
    "upsample_residual": (False,),
    "upsample_factor": (1,),
    "patch_size": 8,
}


def make_vae() -> AutoencoderKLLTXVideo:
    """A fresh autoencoder, its posterior nearly noiseless at the start (its last channel is the log-variance of all)."""
    vae = AutoencoderKLLTXVideo(**VAE_CONFIG)
    with torch.no_grad():
        vae.encoder.conv_out.conv.weight[-1].mul_(0.1)
        vae.encoder.conv_out.conv.bias[-1] = -5.0
    return vae


def windows(clips: Tensor, generator: torch.Generator, size: int = 48, frames: int = 5) -> Tensor:
    """A few frames of a part of each clip that shows the object, both aligned to the latent grid: ``[n, 3, frames, size, size]``."""
    parts = []
    for clip in clips:
        first = 2 * int(torch.randint((clip.shape[1] - frames) // 2 + 1, (), generator=generator))
        clip = clip[:, first : first + frames]
        mass = saturation(clip[None])[0, 0].mean(0) + 1e-4
        axis = torch.arange(clip.shape[-1]) + 0.5
        center = torch.stack([(mass.sum(1) * axis).sum(), (mass.sum(0) * axis).sum()]) / mass.sum()
        center = center + torch.rand(2, generator=generator) * 16 - 8
        top, left = ((center - size / 2) / 16).round().mul(16).clamp(0, clip.shape[-1] - size).int().tolist()
        parts.append(clip[..., top : top + size, left : left + size])
    return torch.stack(parts)


def vae_loss(vae: AutoencoderKLLTXVideo, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Loss on clips ``[n, 3, frames, h, w]`` in [-1, 1], and the figures worth noting."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_var = (x.float() for x in vae.encoder(batch).chunk(2, 1))
        latents = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        output = vae.decoder(latents)
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
    loss = reconstruction_loss(output, batch)
    return loss + 1e-4 * kl, {"loss": loss.item(), "kl": kl.item()}


@torch.no_grad()
def reconstruct(vae: AutoencoderKLLTXVideo, clips: Tensor) -> Tensor:
    """Encode (mean) and decode uint8 clips ``[n, frames, 3, h, w]``: float in [0, 1]."""
    parts = [vae.decode(vae.encode(to_model(part)).latent_dist.mean).sample for part in clips.split(16)]
    return torch.cat([from_model(part.float()) for part in parts])


def trained_vae(file: Path) -> AutoencoderKLLTXVideo:
    """The averaged weights of a checkpoint."""
    vae = make_vae()
    vae.load_state_dict(averaged(file), strict=False)  # the average has no buffers
    return vae


def train_vae(minutes: float, seed: int = 0, pool: int = 4000, resume: bool = False) -> None:
    """Train the autoencoder: three steps of four on windows around the object, every fourth on whole clips."""
    torch.manual_seed(seed)
    vae = make_vae()
    clips, _ = clip_pool(range(seed, seed + pool), FRAMES)
    held_out, _ = clip_pool(range(TEST_SEED, TEST_SEED + 32), FRAMES)
    matrices, rest = split_parameters(vae, lambda _, p: p.ndim >= 4)
    optimizers = [Muon(matrices, lr=2e-3), torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    training = Training(vae, Ema(vae, 0.995), optimizers, RUN / "vae.pt", Clock(minutes, RUN / "vae-minutes.txt"))
    if resume:
        training.resume()
    generator = torch.Generator().manual_seed(seed + training.step)
    curve, figures = Curve(RUN / "vae.csv", append=resume), dict[str, float]()

    def rate(step: int, progress: float) -> float:
        return min(1.0, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    def backward(step: int) -> None:
        whole = step % 4 == 3
        batch = to_model(clips[torch.randint(pool, (4 if whole else 16,), generator=generator)])
        loss, found = vae_loss(vae, batch if whole else windows(batch, generator))
        loss.backward()
        figures.update(found)

    def after(step: int) -> None:
        if step % 100 == 0 or training.clock.progress() >= 1:
            training.save()
            found = psnr(reconstruct(trained_vae(training.file), held_out), held_out.float() / 255).mean().item()
            curve.add(seconds=training.clock.elapsed(), step=step, **figures, psnr=found)

    training.run(rate, backward, after)


@torch.no_grad()
def make_latents() -> None:
    """Encode the clips of the seeds 0 to ``POOL``, and note the latents' mean and deviation per channel."""
    vae, latents, scenes = trained_vae(RUN / "vae.pt"), list[Tensor](), list[Scene]()
    for start in range(0, POOL, 100):
        clips, drawn = clip_pool(range(start, start + 100), FRAMES)
        scenes += drawn
        with torch.autocast("cpu", torch.bfloat16):
            latents += [vae.encode(to_model(part)).latent_dist.mean.half() for part in clips.split(10)]
    stacked = torch.cat(latents)
    flat = stacked.float().transpose(0, 1).flatten(1)
    mean, std = flat.mean(1), flat.std(1)
    save_atomically({"latents": stacked, "scenes": [vars(scene) for scene in scenes], "mean": mean, "std": std}, RUN / "latents.pt")
    say("latents", tuple(stacked.shape), f"mean {mean.min():.2f} to {mean.max():.2f}, deviation {std.min():.2f} to {std.max():.2f}")


# ------------------------------------------------------------------------------------------------------------------------- transformer

TRANSFORMER_CONFIG = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "cross_attention_dim": 128,
    "num_layers": 8,
    "caption_channels": 64,
}
STOCK_TEXT_LENGTH = 128  # what the stock pipeline pads captions to
ROPE_SCALE = (2 / 25, 16, 16)  # what the stock pipeline gives: seconds of a latent frame at 25 frames a second, pixels of a latent


def make_transformer() -> LTXVideoTransformer3DModel:
    """A fresh transformer whose blocks start as the identity and whose output starts at zero."""
    transformer = LTXVideoTransformer3DModel(**TRANSFORMER_CONFIG)
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    blocks = transformer.transformer_blocks
    for module in (transformer.time_embed.linear, transformer.proj_out, *(block.attn2.to_out[0] for block in blocks)):
        nn.init.zeros_(module.weight)
    for module in (transformer, *blocks):
        nn.init.zeros_(module.scale_shift_table)
    return transformer


def plain_attention(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """LTXAttention.forward in plain products: cheaper to train on a CPU, and compilable."""
    source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    query, key, value = self.norm_q(self.to_q(hidden_states)), self.norm_k(self.to_k(source)), self.to_v(source)
    if image_rotary_emb is not None:
        query, key = rotate(query, *image_rotary_emb), rotate(key, *image_rotary_emb)
    query, key, value = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
    logits = (query * query.shape[-1] ** -0.5).to(value.dtype) @ key.to(value.dtype).mT
    if attention_mask is not None:
        logits = logits + attention_mask[:, None].to(logits.dtype)
    return self.to_out[0]((logits.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2))


def use_plain_attention(transformer: LTXVideoTransformer3DModel) -> None:
    """Let the blocks compute attention by :func:`plain_attention`."""
    for block in transformer.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            attention.forward = types.MethodType(plain_attention, attention)


@torch.no_grad()
def embed(pipe: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Captions as the stock pipeline encodes them, among unmasked pads, without what it masks afterwards.

    Returns:
        ``[n, TEXT_LENGTH, 64]`` and the mask ``[n, TEXT_LENGTH]``.
    """
    tokens = pipe.tokenizer(captions, padding="max_length", max_length=STOCK_TEXT_LENGTH, truncation=True, return_tensors="pt")
    with torch.autocast("cpu", torch.bfloat16):
        text = pipe.text_encoder(tokens.input_ids)[0]
    return text[:, :TEXT_LENGTH].float(), tokens.attention_mask[:, :TEXT_LENGTH].float()


class Data:
    """Normalized latents with captions; the noise is drawn again each time. The last ``HELD_OUT`` latents are not trained on."""

    def __init__(self, pipe: Any, seed: int):
        stored = torch.load(RUN / "latents.pt")
        mean, std = (stored[name].view(1, -1, 1, 1, 1) for name in ("mean", "std"))
        self.latents = ((stored["latents"].float() - mean) / std).half()
        self.scenes = [Scene(**fields) for fields in stored["scenes"]]
        self.pipe, self.generator = pipe, torch.Generator().manual_seed(seed)

    def batch(self, n: int) -> tuple[Tensor, ...]:
        """Latents, noise, levels, embedded captions and their mask."""
        g = self.generator
        index = torch.randint(len(self.scenes) - HELD_OUT, (n,), generator=g)
        latents = self.latents[index].float()
        noise, sigma = matched_noise(latents, g), noise_levels(n, g)
        sigma = torch.where(torch.rand(n, generator=g) < 0.5, 0.6 + 0.4 * torch.rand(n, generator=g), sigma)  # where captions decide
        captions = some_captions([self.scenes[i] for i in index.tolist()], g)
        return latents, noise, sigma, *embed(self.pipe, captions)


def flow_loss(transformer: Callable, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean squared error of the velocity, noise minus latents."""
    latents, noise, sigma, text, mask = batch
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy, target = (x.flatten(2).mT for x in (latents * (1 - level) + noise * level, noise - latents))
    frames, height, width = latents.shape[2:]
    with torch.autocast("cpu", torch.bfloat16):
        velocity = transformer(noisy, text, sigma * 1000, mask, frames, height, width, ROPE_SCALE, return_dict=False)[0]
    return (velocity.float() - target).square().mean()


def train(minutes: float, seed: int = 0, resume: bool = False) -> None:
    """Train the transformer. Everything needed to go on is saved every 250 steps."""
    torch.manual_seed(seed)
    pipe = DiffusionPipeline.from_pretrained(locate("tiny-dit"), torch_dtype=torch.float32)
    transformer, file = make_transformer(), RUN / "train.pt"
    use_plain_attention(transformer)
    for block in transformer.transformer_blocks:
        block.compile(dynamic=False)
    tables = "scale_shift_table"
    matrices, rest = split_parameters(transformer, lambda name, p: p.ndim == 2 and "blocks." in name and not name.endswith(tables))
    optimizers = [Muon(matrices, lr=2e-3), torch.optim.AdamW(rest, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    data = Data(pipe, seed + torch.load(file, mmap=True)["step"] if resume else seed)
    train_flow(transformer, optimizers, data.batch, lambda part: flow_loss(transformer, part), Plan(), file, minutes, resume)


# ------------------------------------------------------------------------------------------------------------------- export and figures


def export() -> None:
    """Write autoencoder and transformer in float16, and the curves."""
    vae, transformer = trained_vae(RUN / "vae.pt"), LTXVideoTransformer3DModel(**TRANSFORMER_CONFIG)
    stored = torch.load(RUN / "latents.pt", mmap=True)
    vae.latents_mean.copy_(stored["mean"])
    vae.latents_std.copy_(stored["std"])
    transformer.load_state_dict(averaged(RUN / "train.pt"))
    for name, module in (("vae", vae), ("transformer", transformer)):
        module.to(torch.float16).save_pretrained(TRAINED / name, safe_serialization=True)
    say(sum(path.stat().st_size for path in TRAINED.rglob("*.safetensors")) / 1e6, "MB")
    draw(gather({"vae": RUN / "vae.csv", "transformer": RUN / "train.csv"}, CURVES / "tiny-ltx.csv"))


def build(output: Path) -> LTXPipeline:
    """A whole pipeline folder: trained autoencoder and transformer, everything else from ``tiny-dit``."""
    base = DiffusionPipeline.from_pretrained(locate("tiny-dit"), torch_dtype=torch.float16)
    parts = {name: getattr(base, name) for name in ("tokenizer", "text_encoder", "scheduler")}
    for name, kind in (("vae", AutoencoderKLLTXVideo), ("transformer", LTXVideoTransformer3DModel)):
        parts[name] = kind.from_pretrained(TRAINED / name, torch_dtype=torch.float16)
    pipe = LTXPipeline(**parts)
    pipe.save_pretrained(output)
    write_notes(output, CALL, covering_captions(24))
    return pipe


def evaluate(count: int) -> None:
    """The judge on generated clips of unseen seeds and on real ones through the autoencoder, and contact sheets of both."""
    pipe = build(RUN / "pipeline").to(torch.float32)
    captions = [random_clip(TEST_SEED + 10_000 + i, frames=1)[1] for i in range(count)]
    start = time.perf_counter()
    clips = sample(pipe, captions, seed=0, batch=10, **CALL).float()
    say(f"generated n={count} {(time.perf_counter() - start) / count:.2f} s a clip:", rounded(accuracy(clips, captions)))
    contact_sheet(clips[:16], RUN / "sheet.png", captions[:16])
    clips, scenes = clip_pool(range(TEST_SEED + 20_000, TEST_SEED + 20_000 + count), FRAMES)
    real, again = clips.float() / 255, reconstruct(pipe.vae, clips)
    say("reconstructed", rounded(accuracy(again, scenes)), f"PSNR {psnr(again, real).mean():.2f} dB")
    contact_sheet(torch.stack([real[:6], again[:6]], 1).flatten(0, 1), RUN / "sheet-vae.png")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "latents", "train", "export", "build", "evaluate"))
    parser.add_argument("--minutes", type=float, default=20.0, help="planned length; may be changed in runs/tiny-ltx/STAGE-minutes.txt")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted training")
    parser.add_argument("--count", type=int, default=200, help="clips to evaluate on")
    parser.add_argument("--output", type=Path, default=RUN / "pipeline", help="folder of the whole pipeline")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stages = {
        "vae": lambda: train_vae(args.minutes, resume=args.resume),
        "latents": make_latents,
        "train": lambda: train(args.minutes, resume=args.resume),
        "export": export,
        "build": lambda: build(args.output),
        "evaluate": lambda: evaluate(args.count),
    }
    stages[args.stage]()


if __name__ == "__main__":
    main()
