"""Autoencoders of clips, as those of ``tiny-dit`` and ``tiny-ltx`` are trained: losses, the loop, the latents of a pool of clips."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from common import (
    TEST_SEED,
    Clock,
    Curve,
    Ema,
    Muon,
    Training,
    clip_pool,
    contact_sheet,
    psnr,
    rounded,
    save_atomically,
    say,
    split_parameters,
)
from torch import Tensor, nn

from reelquant.models.judge import accuracy
from reelquant.models.shapes import Scene

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Mean and log-variance ``[n, channels, latent frames, rows, columns]`` of clips ``[n, 3, frames, h, w]`` in [-1, 1]."""


def to_model(clips: Tensor) -> Tensor:
    """uint8 ``[n, frames, 3, h, w]`` to float ``[n, 3, frames, h, w]`` in [-1, 1]."""
    return clips.transpose(1, 2).float() / 127.5 - 1


def from_model(clips: Tensor) -> Tensor:
    """Inverse of :func:`to_model`, but float in [0, 1]."""
    return ((clips + 1) / 2).clamp(0, 1).transpose(1, 2)


def saturation(clips: Tensor) -> Tensor:
    """How colourful each pixel is, ``[n, 1, frames, h, w]`` in [0, 1]: all backgrounds are gray, so this finds the object."""
    return ((clips.amax(1, keepdim=True) - clips.amin(1, keepdim=True)) / 1.2).clamp(0, 1)


def around_object(clip: Tensor, size: int, grid: int, generator: torch.Generator) -> Tensor:
    """Cut a window of ``size`` by ``size`` pixels near the object of a clip.

    Args:
        clip: ``[3, frames, h, w]`` in [-1, 1].
        size: of the window.
        grid: its corner lies at multiples of so many pixels.
        generator: moves the window by up to 8 pixels.

    Returns:
        The rows and columns of the window, as slices of the last two axes.
    """
    mass = saturation(clip[None])[0, 0].mean(0) + 1e-4
    axis = torch.arange(clip.shape[-1]) + 0.5
    center = torch.stack([(mass.sum(1) * axis).sum(), (mass.sum(0) * axis).sum()]) / mass.sum()
    center = center + torch.rand(2, generator=generator) * 16 - 8
    top, left = ((center - size / 2) / grid).round().mul(grid).clamp(0, clip.shape[-1] - size).int().tolist()
    return (slice(top, top + size), slice(left, left + size))


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared and absolute errors, up to sevenfold on the object, plus a little on the image gradients."""
    weight = 1 + 6 * saturation(target)
    error = output.float() - target
    loss = (weight * (error.square() + 0.05 * error.abs())).mean()
    for dim in (-1, -2):
        loss = loss + 0.05 * error.diff(dim=dim).abs().mean()
    return loss


def loss_of(encode: Encode, decode: Callable[[Tensor], Tensor], batch: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Loss on clips ``[n, 3, frames, h, w]`` in [-1, 1], and the figures worth noting."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_var = (x.float() for x in encode(batch))
        output = decode(mean + torch.randn_like(mean) * (0.5 * log_var).exp())
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
    loss = reconstruction_loss(output, batch)
    return loss + 1e-4 * kl, {"loss": loss.item(), "kl": kl.item()}


def train_autoencoder(
    vae: nn.Module,
    loss: Callable[[Tensor], tuple[Tensor, dict[str, float]]],
    windows: Callable[[Tensor, torch.Generator], Tensor],
    reconstruct: Callable[[Ema, Tensor], Tensor],
    file: Path,
    minutes: float,
    *,
    frames: int,
    seed: int = 0,
    pool: int = 4000,
    resume: bool = False,
) -> None:
    """Train until the planned time is over: three steps of four on windows around the object, every fourth on whole clips.

    Args:
        vae: what moves.
        loss: as :func:`loss_of`, of clips in [-1, 1].
        windows: cuts a batch of clips.
        reconstruct: uint8 clips through the averaged weights, as float in [0, 1]; noted every 100 steps.
        file: checkpoint; the curve and the changed number of minutes lie beside it, ``NAME.csv`` and ``NAME-minutes.txt``.
        minutes: planned length.
        frames: of a clip.
        seed: of the batches, and of the first of the ``pool`` clips.
        resume: go on from the checkpoint.
    """
    clips, held_out = (clip_pool(range(first, first + count), frames)[0] for first, count in ((seed, pool), (TEST_SEED, 32)))
    matrices, rest = split_parameters(vae, lambda _, p: p.ndim >= 4)
    optimizers = [Muon(matrices, lr=2e-3), torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    ema = Ema(vae, 0.995)
    training = Training(vae, ema, optimizers, file, Clock(minutes, file.with_name(f"{file.stem}-minutes.txt")))
    if resume:
        training.resume()
    generator = torch.Generator().manual_seed(seed + training.step)
    curve, figures = Curve(file.with_suffix(".csv"), append=resume), dict[str, float]()

    def rate(step: int, progress: float) -> float:
        return min(1.0, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    def backward(step: int) -> None:
        whole = step % 4 == 3
        batch = to_model(clips[torch.randint(pool, (4 if whole else 16,), generator=generator)])
        found, noted = loss(batch if whole else windows(batch, generator))
        found.backward()
        figures.update(noted)

    def after(step: int) -> None:
        if step % 100 == 0 or training.clock.progress() >= 1:
            training.save()
            quality = psnr(reconstruct(ema, held_out).float(), held_out.float() / 255).mean().item()
            curve.add(seconds=training.clock.elapsed(), step=step, **figures, psnr=quality)

    training.run(rate, backward, after)


@torch.no_grad()
def encoded(encode: Callable[[Tensor], Tensor], count: int, frames: int) -> tuple[Tensor, list[Scene]]:
    """Latents ``[count, ...]`` in float16 of the clips of the seeds 0 to ``count``, and the scenes; ``encode`` gets clips in [-1, 1]."""
    latents, scenes = list[Tensor](), list[Scene]()
    for start in range(0, count, 100):
        clips, drawn = clip_pool(range(start, start + 100), frames)
        scenes += drawn
        with torch.autocast("cpu", torch.bfloat16):
            latents += [encode(to_model(part)).half() for part in clips.split(10)]
    return torch.cat(latents), scenes


def save_latents(encode: Callable[[Tensor], Tensor], count: int, frames: int, file: Path) -> None:
    """Encode a pool of clips, and note the latents' mean and deviation per channel."""
    latents, scenes = encoded(encode, count, frames)
    flat = latents.float().transpose(0, 1).flatten(1)
    mean, std = flat.mean(1), flat.std(1)
    save_atomically({"latents": latents, "scenes": [vars(scene) for scene in scenes], "mean": mean, "std": std}, file)
    say("latents", tuple(latents.shape), f"mean {mean.min():.2f} to {mean.max():.2f}, deviation {std.min():.2f} to {std.max():.2f}")


def judge_reconstructions(reconstruct: Callable[[Tensor], Tensor], count: int, frames: int, sheet: Path) -> None:
    """The judge on real clips of unseen seeds and on their reconstructions (uint8 in, [0, 1] out), and a contact sheet of both."""
    clips, scenes = clip_pool(range(TEST_SEED + 20_000, TEST_SEED + 20_000 + count), frames)
    real, again = clips.float() / 255, reconstruct(clips)
    say("real", rounded(accuracy(real, scenes)))
    say("reconstructed", rounded(accuracy(again, scenes)), f"PSNR {psnr(again, real).mean():.2f} dB")
    contact_sheet(torch.stack([real[:6], again[:6]], 1).flatten(0, 1), sheet)
