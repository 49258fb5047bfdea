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

import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from autoencoder import around_object, from_model, judge_reconstructions, loss_of, save_latents, to_model, train_autoencoder
from common import (
    CURVES,
    ROOT,
    RUNS,
    TEST_SEED,
    Ema,
    Muon,
    averaged,
    contact_sheet,
    rounded,
    say,
    split_parameters,
    stage_parser,
)
from diffusers import AutoencoderKLLTXVideo, DiffusionPipeline, LTXPipeline, LTXVideoTransformer3DModel
from flow import Plan, matched_noise, noise_levels, some_captions, train_flow
from plot import draw, gather
from tiny_dit import FRAMES, TEXT_LENGTH, rotate
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
        rows, columns = around_object(clip, size, 16, generator)
        parts.append(clip[..., rows, columns])
    return torch.stack(parts)


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


def train_vae(minutes: float, seed: int = 0, resume: bool = False) -> None:
    """Train the autoencoder: three steps of four on windows around the object, every fourth on whole clips."""
    torch.manual_seed(seed)
    vae = make_vae()
    loss = partial(loss_of, lambda clips: vae.encoder(clips).chunk(2, 1), vae.decoder)
    train_autoencoder(vae, loss, windows, reconstruct_averaged, RUN / "vae.pt", minutes, frames=FRAMES, seed=seed, resume=resume)


def reconstruct_averaged(ema: Ema, clips: Tensor) -> Tensor:
    """As :func:`reconstruct`, by the averaged weights."""
    vae = make_vae()
    ema.copy_to(vae)
    return reconstruct(vae, clips)


def make_latents() -> None:
    """Encode the clips of the seeds 0 to ``POOL``, and note the latents' mean and deviation per channel."""
    vae = trained_vae(RUN / "vae.pt")
    save_latents(lambda clips: vae.encode(clips).latent_dist.mean, POOL, FRAMES, RUN / "latents.pt")


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
    judge_reconstructions(partial(reconstruct, pipe.vae), count, FRAMES, RUN / "sheet-vae.png")


def main() -> None:
    """Command line."""
    parser = stage_parser(__doc__, ("vae", "latents", "train", "export", "build", "evaluate"), RUN, minutes=20.0, count=200)
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
