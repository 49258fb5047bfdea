"""Train `tiny-unet`, the bundled AnimateDiff pipeline, from nothing: VAE, latents, UNet with text encoder, export, evaluation.

Run the stages in order, each is a command that can be stopped and started again::

    python training/tiny_unet.py vae
    python training/tiny_unet.py latents
    python training/tiny_unet.py unet
    python training/tiny_unet.py export
    python training/tiny_unet.py evaluate

Everything runs on one core of a CPU with bfloat16 instructions; checkpoints and logs go to ``runs/tiny-unet``. Lengths are planned in wall
time, so a busy machine gives fewer steps, not a later end; the minutes can be changed while a stage runs, by writing another number into
``runs/tiny-unet/STAGE-minutes.txt``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from common import (
    CURVES,
    RUNS,
    WEIGHTS,
    Clock,
    Curve,
    Ema,
    Muon,
    contact_sheet,
    generate,
    linear_decay,
    save_atomically,
    set_lr,
)
from plot import draw, gather
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reelquant.models.sampling import write_notes
from reelquant.models.shapes import SHAPES, Scene, covering_captions, parse_caption, random_clip, vocabulary

RUN = RUNS / "tiny-unet"
FOLDER = WEIGHTS / "tiny-unet"
TEST_SEED = 30_000_000  # the other stages use smaller ones
FRAMES = 8
CALL = {"height": 64, "width": 64, "num_frames": FRAMES, "num_inference_steps": 20, "guidance_scale": 5.0}  # what samples well
LATENT_CHANNELS = 8
LONG_FROM = 0.7  # progress from which every fourth batch is of long clips; until then every tenth is
TEXT_LENGTH = 16
TEXT_WIDTH = 64
START, END = "<|startoftext|>", "<|endoftext|>"


def optimizers_for(module: nn.Module, muon_names: set[str], lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the parameters named, AdamW for all others."""
    named = dict(module.named_parameters())
    matrices = [p for name, p in named.items() if name in muon_names]
    rest = [p for name, p in named.items() if name not in muon_names]
    return [Muon(matrices, lr=lr), torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.99), weight_decay=0.0)]


# --- VAE ------------------------------------------------------------------------------------------------------------------------------


def build_vae() -> nn.Module:
    """A small image autoencoder: 64x64 pixels to 8x8 latents of 8 channels. The posterior starts almost without noise."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.quant_conv.bias[LATENT_CHANNELS:].fill_(-5.0)  # log-variance: unit noise at the start would stall the training
        vae.quant_conv.weight[LATENT_CHANNELS:].zero_()
    return vae


def draw_frames(clips: int, first_seed: int) -> tuple[Tensor, Tensor]:
    """Frames of random clips, uint8 ``[n, 3, 64, 64]``, and the pixel ``[n, 2]`` (row, column) at the centre of each one's object."""
    frames, centres = [], []
    axis = torch.arange(64.0)
    for seed in range(first_seed, first_seed + clips):
        clip, _, _ = random_clip(seed, frames=FRAMES)
        mask = saturation(clip) > 0.1
        area = mask.sum((1, 2)).clamp_min(1)
        centres.append(torch.stack([(mask * axis[:, None]).sum((1, 2)) / area, (mask * axis).sum((1, 2)) / area], 1))
        frames.append((clip * 255).round().byte())
    return torch.cat(frames), torch.cat(centres)


def saturation(frames: Tensor) -> Tensor:
    """Largest minus smallest channel of ``[..., 3, h, w]``: objects are coloured, backgrounds are not."""
    return frames.amax(-3) - frames.amin(-3)


def vae_batch(frames: Tensor, centres: Tensor, crops: int, full: int, step: int, generator: torch.Generator) -> Tensor:
    """Three steps of four: 32x32 crops around the object (four times cheaper). Every fourth: whole frames. In [-1, 1]."""
    count = full if step % 4 == 3 else crops
    index = torch.randint(len(frames), (count,), generator=generator)
    batch = frames[index]
    if step % 4 != 3:
        jitter = torch.rand(count, 2, generator=generator) * 24 - 12
        corners = ((centres[index] - 16 + jitter) / 8).round().clamp(0, 4).long() * 8
        batch = torch.stack([f[:, r : r + 32, c : c + 32] for f, (r, c) in zip(batch, corners.tolist(), strict=True)])
    return batch.float() / 127.5 - 1


def vae_loss(vae: nn.Module, x: Tensor, kl_weight: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Reconstruction with coloured pixels weighted up to seven times, image gradients, and a weak KL. Also the mean squared error."""
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample.float()
    weight = 1 + 6 * saturation(x / 2).clamp(0, 1)[:, None]
    error = y - x
    loss = (weight * (error.abs() + error.square())).mean()
    loss = loss + 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return loss + kl_weight * kl, error.detach().square().mean()


def train_vae(args: argparse.Namespace) -> None:
    """The ``vae`` stage. Writes ``vae.pt`` (averaged weights and everything needed to go on)."""
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    frames, centres = draw_frames(args.clips, first_seed=10_000_000)
    vae = build_vae()
    convolutions = {n for n, p in vae.named_parameters() if p.ndim == 4 and "conv_in" not in n and "conv_out" not in n and "quant" not in n}
    optimizers = optimizers_for(vae, convolutions, lr=2e-3, adam_lr=2e-3)
    ema = Ema(vae, decay=0.995)
    path, step, spent = RUN / "vae.pt", 0, 0.0
    if path.exists():
        step, spent = resume(path, vae, ema, optimizers)
    clock, curve = Clock(args.minutes, RUN / "vae-minutes.txt", spent), Curve(RUN / "vae.csv", append=step > 0)
    running = 0.0
    while (progress := clock.progress()) < 1:
        set_lr(optimizers, min(1, (step + 1) / 50) * linear_decay(progress, decay=0.6, floor=0.01))
        with torch.autocast("cpu", torch.bfloat16):
            loss, mse = vae_loss(vae, vae_batch(frames, centres, args.crops, args.full, step, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(vae)
        running = float(mse) if running == 0 else 0.95 * running + 0.05 * float(mse)
        step += 1
        if step % 100 == 0:
            curve.add(
                step=step,
                seconds=clock.elapsed(),
                loss=float(loss.detach()),
                psnr=-10 * torch.tensor(running / 4).log10().item(),
            )
        if step % 400 == 0:
            save_training(path, vae, ema, optimizers, step, clock.elapsed())
    save_training(path, vae, ema, optimizers, step, clock.elapsed())


def save_training(path: Path, module: nn.Module, ema: Ema, optimizers: list, step: int, spent: float) -> None:
    """Everything a stage needs to go on later."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    save_atomically({"module": module.state_dict(), "ema": ema.state_dict(), "optimizers": states, "step": step, "spent": spent}, path)


def resume(path: Path, module: nn.Module, ema: Ema, optimizers: list) -> tuple[int, float]:
    """Go on from :func:`save_training`, with the rates of today. Returns the step and the seconds spent so far."""
    state = torch.load(path)
    module.load_state_dict(state["module"])
    ema.load_state_dict(state["ema"])
    for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict({"state": values["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    return state["step"], state["spent"]


def load_vae() -> nn.Module:
    """The trained autoencoder (averaged weights) whose latents have mean 0 and deviation 1 once the ``latents`` stage has measured them."""
    vae = build_vae()
    average = Ema(vae)
    average.load_state_dict(torch.load(RUN / "vae.pt")["ema"])
    average.copy_to(vae)
    if (path := RUN / "statistics.pt").exists():
        fold_statistics(vae, *torch.load(path))
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def fold_statistics(vae: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Fold the latents' normalization, per channel, into the 1x1 convolutions around them: no scaling factor is left to apply."""
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:LATENT_CHANNELS] /= std.view(-1, 1, 1, 1)
    quant.bias[:LATENT_CHANNELS].sub_(mean).div_(std)
    quant.bias[LATENT_CHANNELS:] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std.view(1, -1, 1, 1)


# --- latents --------------------------------------------------------------------------------------------------------------------------


def caption_variants(scene: Scene) -> list[str]:
    """The four captions of a scene: with and without the size word, with and without the background words."""
    return [scene.caption(size=size, background=background) for size in (True, False) for background in (True, False)]


@torch.no_grad()
def encode_clips(vae: nn.Module, clips: int, frames: int, first_seed: int) -> tuple[Tensor, list[list[str]]]:
    """Latents ``[clips, channels, frames, 8, 8]`` in float16 and the captions of random clips."""
    latents, captions = [], []
    for seed in range(first_seed, first_seed + clips):
        clip, _, scene = random_clip(seed, frames=frames)
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(clip * 2 - 1).latent_dist.mean
        latents.append(mean.float().half().transpose(0, 1))
        captions.append(caption_variants(scene))
    return torch.stack(latents), captions


def make_latents(args: argparse.Namespace) -> None:
    """The ``latents`` stage: measure the latents' mean and deviation, then encode the training clips of both lengths."""
    (RUN / "statistics.pt").unlink(missing_ok=True)
    sample, _ = encode_clips(load_vae(), 200, FRAMES, first_seed=20_000_000)
    sample = sample.float().transpose(0, 1).flatten(1)
    save_atomically((sample.mean(1), sample.std(1)), RUN / "statistics.pt")
    print("mean", sample.mean(1).tolist(), "std", sample.std(1).tolist())
    vae = load_vae()
    for frames, clips, seed in ((FRAMES, args.clips, 0), (2 * FRAMES, args.long_clips, 1_000_000)):
        save_atomically(encode_clips(vae, clips, frames, seed), RUN / f"latents-{frames}.pt")


# --- tokenizer and text encoder -------------------------------------------------------------------------------------------------------


def make_tokenizer(folder: Path):
    """A CLIP tokenizer whose byte-pair merges turn every word of the captions into one token; other words fall into letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(vocabulary(), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([START, END, *pieces]))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, bos_token=START, eos_token=END, unk_token=END, pad_token=END, model_max_length=TEXT_LENGTH)


def build_text_encoder(tokenizer) -> nn.Module:
    """A two-layer CLIP text model of width 64, trained together with the UNet."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


# --- UNet -----------------------------------------------------------------------------------------------------------------------------


def build_unet() -> nn.Module:
    """Two levels, spatial, cross and temporal attention in every block. Every residual branch starts at zero."""
    from diffusers import UNetMotionModel

    unet = UNetMotionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlockMotion",) * 2,
        up_block_types=("CrossAttnUpBlockMotion",) * 2,
        block_out_channels=(64, 96),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
        num_attention_heads=1,
        motion_num_attention_heads=1,
        motion_max_seq_length=32,
    )
    for name, p in unet.named_parameters():
        if any(part in name for part in ("conv_out.", ".conv2.", ".to_out.0.")):
            nn.init.zeros_(p)
    announce_frames(unet)
    return unet


@torch.no_grad()
def announce_frames(unet: nn.Module, components: int = 4, strength: float = 0.25) -> None:
    """Let the motion modules pass on from the start which frame is which.

    The frame's number alone predicts nothing, only together with the caption's verb, so gradients take very long to let it through the
    temporal attention, and until then no motion can follow its caption. Here the main directions of the positional embedding get
    channels of their own in the values of the modules on the way down.
    """
    for block in [*unet.down_blocks, unet.mid_block]:
        for module in block.motion_modules:
            transformer = module.transformer_blocks[0]
            embedding = transformer.pos_embed.pe[0, : 2 * FRAMES]
            directions = torch.linalg.svd(embedding - embedding.mean(0)).Vh[:components]
            attention = transformer.attn1
            attention.to_v.weight[-components:] = directions
            attention.to_out[0].weight[:, -components:] = strength * torch.randn(embedding.shape[1], components)


@torch.no_grad()
def announce_words(model: Denoiser, tokenizer, gain: float = 4.0) -> None:
    """Let every word of the caption reach the UNet's features from the start, for the same reason as :func:`announce_frames`.

    Colours and backgrounds predict something alone and are learned within minutes either way. Verbs do so only together with the frame,
    objects only together with the place; with the usual small start their words never came through. Embeddings start large, and the
    cross-attention's outputs so that a single word, one of sixteen positions, moves the features noticeably; what all captions have in
    common is taken off.
    """
    embedding = next(p for name, p in model.text_encoder.named_parameters() if name.endswith("token_embedding.weight"))
    nn.init.normal_(embedding, std=0.7)
    captions = [caption for seed in range(100) for caption in caption_variants(random_clip(seed, frames=1)[2])]
    common = model.text_encoder(tokenize(tokenizer, captions))[0].mean((0, 1))
    for name, module in model.unet.named_modules():
        if name.endswith("attn2") and "motion_modules" not in name:
            output = module.to_out[0]
            nn.init.normal_(output.weight, std=gain * output.in_features**-0.5)
            output.bias.copy_(-output.weight @ (module.to_v.weight @ common))


class BmmAttention:
    """Single-head attention as two batched products: on a CPU its backward is cheaper than that of fused attention.

    Text may come once per clip instead of once per frame; the frames are then queries of the same text.
    """

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        width = query.shape[-1]
        scores = (query.reshape(len(text), -1, width) * width**-0.5) @ key.transpose(1, 2)
        return attn.to_out[0]((scores.softmax(-1) @ value).reshape(query.shape))


class Denoiser(nn.Module):
    """UNet and text encoder: what the ``unet`` stage trains."""

    def __init__(self, tokenizer):
        super().__init__()
        self.unet = build_unet()
        self.text_encoder = build_text_encoder(tokenizer)
        announce_words(self, tokenizer)

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Predict v for ``[batch, channels, frames, 8, 8]``."""
        text = self.text_encoder(tokens)[0]
        return self.unet(noisy, timesteps, encoder_hidden_states=text, return_dict=False)[0]


class HalfCopy:
    """A bfloat16 copy of a module that computes, while the float32 original is what the optimizers move."""

    def __init__(self, master: nn.Module):
        self.module = copy.deepcopy(master).bfloat16()
        self.masters, self.copies = list(master.parameters()), list(self.module.parameters())

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the original's weights."""
        torch._foreach_copy_(self.copies, self.masters)

    @torch.no_grad()
    def move_gradients(self) -> None:
        """Hand the gradients to the original, in float32."""
        for master, half in zip(self.masters, self.copies, strict=True):
            master.grad = None if half.grad is None else half.grad.float()
            half.grad = None


def compile_blocks(unet: nn.Module) -> None:
    """Fuse the elementwise work of the transformer blocks (a third of their time). All blocks of one shape share a compilation."""
    from diffusers.models.attention import BasicTransformerBlock

    torch._dynamo.config.recompile_limit = 32
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            module.compile(dynamic=False)


def noise_levels() -> Tensor:
    """Cumulative alphas of the linear schedule, ``[1000]``."""
    return (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)


def draw_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Two of three around a log signal-to-noise ratio of -2, where objects take shape; one of three from the noisiest 400 steps.

    In the noisiest steps nothing but the caption says where the object goes, so that is where motions are learned.
    """
    alphas = noise_levels()
    log_snr = (alphas / (1 - alphas)).log()
    draw = torch.randn(count, generator=generator) * 2 - 2
    timesteps = torch.searchsorted(-log_snr, -draw).clamp(max=999)
    noisiest = torch.randint(600, 1000, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 1 / 3, noisiest, timesteps)


class ClipBatches:
    """Batches of latents and tokens, some of them of clips twice as long, half as many. Some captions are empty, for guidance.

    The five shapes are a third of the world's objects but 60 % of these batches: digits are the harder two thirds.
    """

    def __init__(self, tokenizer, batch: int):
        self.batch = batch
        self.empty = tokenize(tokenizer, [""])[0]
        self.latents, self.tokens, self.weights = {}, {}, {}
        for frames in (FRAMES, 2 * FRAMES):
            self.latents[frames], captions = torch.load(RUN / f"latents-{frames}.pt")
            flat = tokenize(tokenizer, [caption for variants in captions for caption in variants])
            self.tokens[frames] = flat.view(len(captions), 4, TEXT_LENGTH)
            self.weights[frames] = torch.tensor([1.8 if parse_caption(variants[0])["shape"] in SHAPES else 0.6 for variants in captions])

    def draw(self, long: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents ``[n, channels, frames, 8, 8]`` and tokens ``[n, length]`` of one step, of ``long`` clips or of short ones."""
        frames, count = (2 * FRAMES, self.batch // 2) if long else (FRAMES, self.batch)
        index = torch.multinomial(self.weights[frames], count, generator=generator)
        size, background, empty = torch.rand(3, count, generator=generator)
        variant = 2 * (size >= 0.7).long() + (background >= 0.8).long()
        tokens = torch.where((empty < 0.1)[:, None], self.empty, self.tokens[frames][index, variant])
        return self.latents[frames][index].float(), tokens


def tokenize(tokenizer, captions: list[str]) -> Tensor:
    """Token numbers ``[n, length]``, padded as the pipeline pads."""
    return tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt").input_ids


def unet_gradients(half: HalfCopy, latents: Tensor, tokens: Tensor, micro: int, generator: torch.Generator) -> Tensor:
    """Gradients of one step, in micro-batches whose activations stay in the cache. Returns the loss per clip and its time step."""
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = draw_timesteps(len(latents), generator)
    alphas = noise_levels()[timesteps].view(-1, 1, 1, 1, 1)
    noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    target = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
    losses = []
    for part in torch.arange(len(latents)).split(micro):
        prediction = half.module(noisy[part].bfloat16(), timesteps[part], tokens[part])
        loss = (prediction.float() - target[part]).square().flatten(1).mean(1)
        (loss.sum() / len(latents)).backward()
        losses.append(loss.detach())
    return torch.stack([torch.cat(losses), timesteps.float()])


class Team:
    """The processes that train together, if there are several: each draws its own batches, and the gradients are averaged.

    One process per core is faster than one process with several threads. Start each as ``torchrun`` would (``torchrun --nproc-per-node 2
    training/tiny_unet.py unet``); without its environment variables the team is this process alone.
    """

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.stop = False
        signal.signal(signal.SIGTERM, self._ask_to_stop)
        if self.size > 1:
            dist.init_process_group("gloo")

    def _ask_to_stop(self, *_) -> None:
        self.stop = True

    def agree(self, progress: float) -> float:
        """The first process's progress, for all; 1 once it was asked to stop."""
        shared = torch.tensor([1.0 if self.stop else progress], dtype=torch.float64)
        if self.size > 1:
            dist.broadcast(shared, 0)
        return shared.item()

    def average_gradients(self, module: nn.Module) -> None:
        """Give every process the mean of all gradients."""
        if self.size > 1:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            for gradient, mean in zip(gradients, (flat / self.size).split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))


def unet_optimizers(model: Denoiser, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for every matrix inside the UNet's blocks, AdamW elsewhere."""
    inside_blocks = [(name, p) for name, p in model.unet.named_parameters(prefix="unet") if "_blocks." in name or "mid_block." in name]
    return optimizers_for(model, {name for name, p in inside_blocks if p.ndim > 1}, lr=lr, adam_lr=0.75 * lr)


def train_unet(args: argparse.Namespace) -> None:
    """The ``unet`` stage. Writes ``unet.pt`` (averaged weights and everything needed to go on)."""
    torch.manual_seed(2)
    team, path = Team(), RUN / "unet.pt"
    tokenizer = make_tokenizer(RUN / f"tokenizer-{team.rank}")
    batches = ClipBatches(tokenizer, args.batch)
    model = Denoiser(tokenizer)
    model.unet.set_attn_processor(BmmAttention())
    optimizers, ema = unet_optimizers(model, args.lr), Ema(model, decay=0.998)
    step, spent = resume(path, model, ema, optimizers) if path.exists() else (0, 0.0)
    generator = torch.Generator().manual_seed(3 + step + 1_000_000 * team.rank)
    half = HalfCopy(model)
    if args.compile:
        compile_blocks(half.module.unet)
    clock = Clock(args.minutes, RUN / "unet-minutes.txt", spent)
    curve = Curve(RUN / "unet.csv", append=step > 0) if team.rank == 0 else None
    saved, seen = clock.elapsed(), []
    while (progress := team.agree(clock.progress())) < 1:
        factor = min(1, (step + 1) / 100) * linear_decay(progress, decay=0.2, floor=0.01)
        set_lr(optimizers, factor)
        half.refresh()
        long = step % (10 if progress < LONG_FROM else 4) == 0
        latents, tokens = batches.draw(long, generator)
        seen.append(unet_gradients(half, latents, tokens, args.micro * FRAMES // latents.shape[2], generator))
        half.move_gradients()
        team.average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ema.update(model)
        step += 1
        if curve and step % 50 == 0:
            curve.add(step=step, seconds=clock.elapsed(), lr=factor * args.lr, **summarize_losses(torch.cat(seen[-50:], 1)))
        if curve and clock.elapsed() - saved > 240:
            save_training(path, model, ema, optimizers, step, clock.elapsed())
            saved = clock.elapsed()
    if team.rank == 0:
        save_training(path, model, ema, optimizers, step, clock.elapsed())


def summarize_losses(seen: Tensor) -> dict[str, float]:
    """Mean loss over all clips and over the three thirds of the time steps."""
    loss, timesteps = seen
    thirds = {name: loss[(timesteps >= low) & (timesteps < low + 334)] for name, low in (("early", 0), ("middle", 333), ("late", 666))}
    return {"loss": loss.mean().item(), **{f"loss_{name}": values.mean().item() for name, values in thirds.items()}}


# --- export and evaluation ------------------------------------------------------------------------------------------------------------


def build_pipeline(average: bool = False):
    """The pipeline of the latest checkpoints, in float32, of the last weights or of their average.

    After the schedule's end the last weights are the better ones, before it the average is.
    """
    from diffusers import AnimateDiffPipeline, DDIMScheduler

    tokenizer = make_tokenizer(RUN / "tokenizer")
    model = Denoiser(tokenizer)
    state = torch.load(RUN / "unet.pt")
    model.load_state_dict(state["module"])
    if average:
        ema = Ema(model)
        ema.load_state_dict(state["ema"])
        ema.copy_to(model)
    scheduler = DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    return AnimateDiffPipeline(
        vae=load_vae(),
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        motion_adapter=None,
        scheduler=scheduler,
    )


def export(args: argparse.Namespace) -> None:
    """The ``export`` stage: write the pipeline folder in float16, replacing the old one at once."""
    fresh = args.folder.with_name("." + args.folder.name + "-fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    build_pipeline(args.average).to(torch.float16).save_pretrained(fresh)
    polish(fresh)
    write_notes(fresh, CALL, covering_captions(24))
    shutil.rmtree(args.folder, ignore_errors=True)
    fresh.rename(args.folder)
    write_curve()
    print(f"{sum(file.stat().st_size for file in args.folder.rglob('*') if file.is_file()) / 2**20:.2f} MiB")


def write_curve() -> None:
    """Gather the figures of both trainings in one file, and draw it."""
    columns = ("seconds", "step", "loss", "psnr", "loss_early", "loss_middle", "loss_late")
    draw(gather({stage: RUN / f"{stage}.csv" for stage in ("vae", "unet")}, CURVES / "tiny-unet.csv", columns))


def polish(folder: Path) -> None:
    """Let every version of transformers open the folder.

    Version 4 wants the tokenizer's older files and an older prefix of the text encoder's weights. Version 5 reads both ways, but takes the
    text encoder's type from its configuration, float16, where the other parts come up as float32.
    """
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(RUN / "tokenizer" / name, folder / "tokenizer" / name)
    edit_json(folder / "tokenizer" / "tokenizer_config.json", is_local=None, local_files_only=None)
    edit_json(folder / "text_encoder" / "config.json", dtype="float32")
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {"text_model." + key.removeprefix("text_model."): value for key, value in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def edit_json(path: Path, **changes) -> None:
    """Change some values of a JSON file; None drops one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in changes or value is not None}, indent=2) + "\n")


def evaluate(args: argparse.Namespace) -> None:
    """The ``evaluate`` stage: the judge on generated clips of unseen seeds, and a contact sheet."""
    from diffusers import DiffusionPipeline

    from reelquant.models.judge import accuracy

    pipe = build_pipeline(args.average) if args.latest else DiffusionPipeline.from_pretrained(args.folder)
    pipe.set_progress_bar_config(disable=True)
    captions = [random_clip(TEST_SEED + i, frames=2)[1] for i in range(args.clips)]
    call = {} if args.defaults else {"num_frames": FRAMES, "guidance_scale": args.guidance, "num_inference_steps": args.steps}
    start = time.perf_counter()
    clips = generate(pipe, captions, **call)
    seconds = (time.perf_counter() - start) / len(clips)
    print(f"n={len(clips)} {call or 'defaults'} {seconds:.2f} s a clip:", percent(accuracy(clips, captions)), flush=True)
    contact_sheet(clips[:14], args.sheet or RUN / "sheet.png", captions[:14], every=clips.shape[1] // FRAMES)


@torch.no_grad()
def ceilings(args: argparse.Namespace) -> None:
    """The ``ceilings`` stage: the judge on real clips of unseen seeds, and on what the exported autoencoder makes of them."""
    from diffusers import AutoencoderKL

    from reelquant.models.judge import accuracy

    vae = AutoencoderKL.from_pretrained(args.folder / "vae")
    real, _, scenes = zip(*(random_clip(TEST_SEED + i, frames=FRAMES) for i in range(args.clips)), strict=True)
    again = [vae.decode(vae.encode(clip * 2 - 1).latent_dist.mean).sample.div(2).add(0.5).clamp(0, 1) for clip in real]
    errors = torch.stack([(a - b).square().mean() for a, b in zip(real, again, strict=True)])
    print("real", percent(accuracy(torch.stack(real), scenes)))
    print("reconstructed", percent(accuracy(torch.stack(again), scenes)), f"PSNR {(-10 * errors.log10()).mean():.2f} dB")
    pairs = [clip for pair in zip(real[:6], again[:6], strict=True) for clip in pair]
    contact_sheet(torch.stack(pairs), RUN / "sheet-vae.png", every=1)


def percent(figures: dict[str, float]) -> str:
    """For printing."""
    return ", ".join(f"{name} {100 * value:.1f} %" for name, value in figures.items())


# --- command line ---------------------------------------------------------------------------------------------------------------------


def add_export_stages(stages) -> None:
    """Command line of the stages after training."""
    for name, run, text in (
        ("export", export, "write the pipeline folder"),
        ("evaluate", evaluate, "judge generated clips"),
        ("ceilings", ceilings, "judge real and reconstructed clips"),
    ):
        stage = stages.add_parser(name, help=text)
        stage.add_argument("--folder", type=Path, default=FOLDER)
        stage.add_argument("--clips", type=int, default=200)
        stage.add_argument("--guidance", type=float, default=5.0)
        stage.add_argument("--steps", type=int, default=25)
        stage.add_argument("--defaults", action="store_true", help="call the pipeline with its default arguments: 16 frames, 50 steps")
        stage.add_argument("--latest", action="store_true", help="judge the latest checkpoint instead of the exported folder")
        stage.add_argument("--average", action="store_true", help="the checkpoint's averaged weights instead of its last ones")
        stage.add_argument("--sheet", type=Path)
        stage.set_defaults(run=run)


def main() -> None:
    """Parse the command line and run one stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    stages = parser.add_subparsers(dest="stage", required=True)
    vae = stages.add_parser("vae", help="train the autoencoder")
    vae.add_argument("--minutes", type=float, default=11)
    vae.add_argument("--clips", type=int, default=2500)
    vae.add_argument("--crops", type=int, default=32)
    vae.add_argument("--full", type=int, default=12)
    vae.set_defaults(run=train_vae)
    latents = stages.add_parser("latents", help="encode the training clips")
    latents.add_argument("--clips", type=int, default=8000)
    latents.add_argument("--long-clips", type=int, default=2000)
    latents.set_defaults(run=make_latents)
    unet = stages.add_parser("unet", help="train the UNet and the text encoder")
    unet.add_argument("--minutes", type=float, default=95)
    unet.add_argument("--batch", type=int, default=16)
    unet.add_argument("--micro", type=int, default=16)
    unet.add_argument("--lr", type=float, default=2e-3)
    unet.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    unet.set_defaults(run=train_unet)
    add_export_stages(stages)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    RUN.mkdir(parents=True, exist_ok=True)
    args.run(args)


if __name__ == "__main__":
    main()
