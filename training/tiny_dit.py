"""Train the bundled ``tiny-dit``: a stock WanPipeline (UMT5 encoder, Wan VAE, Wan transformer) for captioned clips of moving shapes.

Stages, in this order (one core; each writes below ``runs/tiny-dit``)::

    PYTHONPATH=src python training/tiny_dit.py vae --minutes 11
    PYTHONPATH=src python training/tiny_dit.py latents
    PYTHONPATH=src python training/tiny_dit.py dit --minutes 70
    PYTHONPATH=src python training/tiny_dit.py decoder --minutes 8
    PYTHONPATH=src python training/tiny_dit.py export
    PYTHONPATH=src python training/tiny_dit.py evaluate
"""

from __future__ import annotations

import argparse
import math
import types

import torch
import torch.nn.functional as F
from common import RUNS, TEST_SEED, Clock, Curve, Ema, Muon, clip_pool, contact_sheet, linear_decay, psnr, save_atomically, set_lr
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from torch import Tensor, nn

RUN = RUNS / "tiny-dit"
FRAMES = 13

# ---------------------------------------------------------------------------------------------------------------------------- vae

VAE_CONFIG = {
    "base_dim": 48,
    "z_dim": 8,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "is_residual": True,
    "patch_size": 4,
    "in_channels": 48,
    "out_channels": 48,
    "scale_factor_temporal": 2,
    "scale_factor_spatial": 8,
    "latents_mean": [0.0] * 8,
    "latents_std": [1.0] * 8,
}


def _resample_whole(self: WanResample, x: Tensor, feat_cache: object = None, feat_idx: object = None) -> Tensor:
    """WanResample.forward on a whole sequence at once, equal to the chunked forward of the stock autoencoder."""
    batch, _, frames, _, _ = x.shape
    if self.mode == "upsample3d":  # the first frame stays single, every other becomes two
        later = self.time_conv(x[:, :, 1:])
        later = later.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
        x = torch.cat([x[:, :, :1], later], 2)
        frames = x.shape[2]
    x = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames)).transpose(1, 2)
    if self.mode == "downsample3d":
        x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
    return x


def make_vae() -> AutoencoderKLWan:
    """A fresh autoencoder, its posterior nearly noiseless at the start (unit noise, the default, stalls the training)."""
    vae = AutoencoderKLWan(**VAE_CONFIG)
    with torch.no_grad():
        vae.quant_conv.weight[VAE_CONFIG["z_dim"] :].mul_(0.1)
        vae.quant_conv.bias[VAE_CONFIG["z_dim"] :].fill_(-5.0)
    return vae


def use_whole_sequences(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Let ``encode_whole`` and ``decode_whole`` work: far fewer calls than the chunked forward. Not for saving pipelines with."""
    for module in vae.modules():
        if isinstance(module, WanResample):
            module.forward = types.MethodType(_resample_whole, module)
    return vae


def encode_whole(vae: AutoencoderKLWan, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance ``[n, 8, latent frames, h / 8, w / 8]`` of clips ``[n, 3, frames, h, w]`` in [-1, 1]."""
    mean, log_var = vae.quant_conv(vae.encoder(patchify(clips, 4))).chunk(2, 1)
    return mean, log_var.clamp(-30, 20)


def decode_whole(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Clips ``[n, 3, frames, h, w]``, not clamped (a clamp has no gradient outside [-1, 1])."""
    return unpatchify(vae.decoder(vae.post_quant_conv(latents), first_chunk=True), 4)


def to_model(clips: Tensor) -> Tensor:
    """uint8 ``[n, frames, 3, h, w]`` to float ``[n, 3, frames, h, w]`` in [-1, 1]."""
    return clips.transpose(1, 2).float() / 127.5 - 1


def from_model(clips: Tensor) -> Tensor:
    """Inverse of :func:`to_model`, but float in [0, 1]."""
    return ((clips + 1) / 2).clamp(0, 1).transpose(1, 2)


def saturation(clips: Tensor) -> Tensor:
    """How colourful each pixel is, ``[n, 1, frames, h, w]`` in [0, 1]: all backgrounds are gray, so this finds the object."""
    return ((clips.amax(1, keepdim=True) - clips.amin(1, keepdim=True)) / 1.2).clamp(0, 1)


def crop_objects(clips: Tensor, generator: torch.Generator, size: int = 32) -> Tensor:
    """Cut a window around the object's place in a random frame, aligned to the latent grid: ``[n, 3, frames, size, size]``."""
    crops = []
    for clip in clips:
        frame = clip[:, int(torch.randint(clip.shape[1], (), generator=generator))]
        mass = saturation(frame[None, :, None])[0, 0, 0] + 1e-4
        axis = torch.arange(clip.shape[-1]) + 0.5
        center = torch.stack([(mass.sum(1) * axis).sum(), (mass.sum(0) * axis).sum()]) / mass.sum()
        center = center + torch.rand(2, generator=generator) * 16 - 8
        top, left = ((center - size / 2) / 8).round().mul(8).clamp(0, clip.shape[-1] - size).int().tolist()
        crops.append(clip[..., top : top + size, left : left + size])
    return torch.stack(crops)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared and absolute errors, up to sevenfold on the object, plus a little on the image gradients."""
    weight = 1 + 6 * saturation(target)
    error = output.float() - target
    loss = (weight * (error.square() + 0.05 * error.abs())).mean()
    for dim in (-1, -2):
        loss = loss + 0.05 * error.diff(dim=dim).abs().mean()
    return loss


def split_parameters(module: nn.Module, is_matrix) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters for Muon (``is_matrix(name, p)``) and for AdamW."""
    matrices = [p for name, p in module.named_parameters() if is_matrix(name, p)]
    rest = [p for name, p in module.named_parameters() if not is_matrix(name, p)]
    return matrices, rest


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """Stock encode (mean) and decode of uint8 clips ``[n, frames, 3, h, w]``: float in [0, 1]."""
    return torch.cat([from_model(decode_whole(vae, encode_whole(vae, to_model(part))[0])) for part in clips.split(16)])


def train_vae(minutes: float, seed: int = 0, pool: int = 4000, decoder_only: bool = False) -> None:
    """Train the autoencoder, or only its decoder on from where the autoencoder ended (which leaves the latents as they are)."""
    torch.manual_seed(seed + decoder_only)
    generator = torch.Generator().manual_seed(seed + decoder_only)
    name = "decoder" if decoder_only else "vae"
    vae = use_whole_sequences(make_vae())
    if decoder_only:
        vae.load_state_dict(torch.load(RUN / "vae.pt"))
        for module in (vae.encoder, vae.quant_conv):
            module.requires_grad_(False)
    ema = Ema(vae, 0.995)
    clips, _ = clip_pool(range(seed, seed + pool), FRAMES)
    held_out, _ = clip_pool(range(TEST_SEED, TEST_SEED + 32), FRAMES)
    matrices, rest = split_parameters(vae, lambda _, p: p.ndim >= 4 and p.requires_grad)
    optimizers = [Muon(matrices, lr=2e-3), torch.optim.AdamW([p for p in rest if p.requires_grad], lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    curve, clock, step = Curve(RUN / f"{name}.csv"), Clock(minutes, RUN / f"{name}-minutes.txt"), 0
    while (progress := clock.progress()) < 1:
        set_lr(optimizers, min(1.0, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))))
        whole = step % 4 == 3
        batch = to_model(clips[torch.randint(pool, (4 if whole else 16,), generator=generator)])
        loss, figures = vae_loss(vae, batch if whole else crop_objects(batch, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update(vae)
        step += 1
        if step % 100 == 0 or progress >= 1:
            checkpoint_vae(vae, ema, held_out, name)
            curve.add(seconds=clock.elapsed(), step=step, **figures, psnr=evaluate_vae(ema, held_out))
    checkpoint_vae(vae, ema, held_out, name)
    curve.add(seconds=clock.elapsed(), step=step, **figures, psnr=evaluate_vae(ema, held_out))


def vae_loss(vae: AutoencoderKLWan, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Loss on clips ``[n, 3, frames, h, w]`` in [-1, 1], and the figures worth noting."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_var = (x.float() for x in encode_whole(vae, batch))
        latents = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        output = decode_whole(vae, latents)
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
    loss = reconstruction_loss(output, batch)
    return loss + 1e-4 * kl, {"loss": loss.item(), "kl": kl.item()}


def evaluate_vae(ema: Ema, held_out: Tensor) -> float:
    """Mean PSNR in dB of the averaged weights on held-out clips."""
    vae = use_whole_sequences(make_vae())
    ema.copy_to(vae)
    with torch.autocast("cpu", torch.bfloat16):
        return psnr(reconstruct(vae, held_out).float(), held_out.float() / 255).mean().item()


def checkpoint_vae(vae: AutoencoderKLWan, ema: Ema, held_out: Tensor, name: str) -> None:
    """Save the averaged weights as a state dict."""
    save_atomically({**vae.state_dict(), **ema.shadow}, RUN / f"{name}.pt")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "latents", "dit", "decoder", "export", "evaluate"))
    parser.add_argument("--minutes", type=float, default=11.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.stage in ("vae", "decoder"):
        train_vae(args.minutes, decoder_only=args.stage == "decoder")


if __name__ == "__main__":
    main()
