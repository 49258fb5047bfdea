"""The parts of a pipeline that do not denoise: run a text encoder on prompts, an encoder of pictures on pictures, a VAE on a clip."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reelquant._errors import UnsupportedError

CLIP_SIZES = [(frames, 64) for frames in (9, 17, 13, 5, 1)]  # frames, pixels a side: some VAEs take 4k + 1 frames, some 8k + 1 or 6k + 1
METHODS = ("encode", "decode")  # by which pipelines call VAEs
_USUAL = {"num_images_per_prompt": 1, "num_videos_per_prompt": 1, "do_classifier_free_guidance": False}


@torch.no_grad()
def embed(pipe: Any, prompts: Sequence[str]) -> list[Tensor]:
    """What the denoiser is given for these texts: every float tensor that the pipeline's ``encode_prompt`` returns.

    Raises:
        UnsupportedError: if the pipeline has no ``encode_prompt``, or it wants more than texts.
    """
    if not hasattr(pipe, "encode_prompt"):
        raise UnsupportedError(f"{type(pipe).__name__} has no encode_prompt")
    parameters = inspect.signature(pipe.encode_prompt).parameters
    given = {name: value for name, value in _USUAL.items() if name in parameters}
    if "device" in parameters:
        given["device"] = getattr(pipe, "_execution_device", torch.device("cpu"))
    missing = [
        name for name, p in parameters.items() if p.default is p.empty and name not in {"prompt", *given} and p.kind != p.VAR_KEYWORD
    ]
    if missing:
        raise UnsupportedError(f"encode_prompt of {type(pipe).__name__} also wants {', '.join(missing)}")
    result = pipe.encode_prompt(prompt=list(prompts), **given)
    parts = result if isinstance(result, list | tuple) else [result]
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]


@torch.no_grad()
def seen(encoder: nn.Module, pictures: Sequence[Any]) -> list[Tensor]:
    """What an encoder of pictures gives for these PIL images: every float tensor of its output, ``[pictures, ..., width]``.

    Raises:
        UnsupportedError: if its config names no size of pictures, or it takes none of that size; with its own words.
    """
    size = getattr(getattr(encoder, "config", None), "image_size", None)
    if not isinstance(size, int):
        raise UnsupportedError(f"the config of {type(encoder).__name__} names no image_size")
    parameter = next(encoder.parameters())
    arrays = [torch.from_numpy(np.array(picture.convert("RGB").resize((size, size)))) for picture in pictures]
    x = (torch.stack(arrays).movedim(-1, 1).float() / 255 - 0.5) / 0.27  # about the mean and spread that encoders are trained with
    try:
        result = encoder(pixel_values=x.to(parameter.device, parameter.dtype))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedError(f"{type(encoder).__name__} takes no pictures {tuple(x.shape)}: {error}") from error
    parts = result.values() if isinstance(result, dict) else result
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point() and part.ndim > 1]


def cosines(reference: Sequence[Tensor], test: Sequence[Tensor]) -> Tensor:
    """Cosine of every token's embedding with the reference's, flat; padding (all zeros) is left out."""
    found = []
    for one, other in zip(reference, test, strict=True):
        a, b = one.float().flatten(0, -2), other.float().flatten(0, -2)
        used = a.square().sum(-1) > 0
        found.append(torch.nn.functional.cosine_similarity(a[used], b[used], dim=-1))
    return torch.cat(found)


def moving_clip(frames: int, size: int) -> Tensor:
    """A disc over a gradient, one pixel to the right every frame, ``[1, 3, frames, size, size]`` in [-1, 1]."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    pictures = []
    for frame in range(frames):
        disc = (x - size / 3 - frame).square() + (y - size / 2).square() < (size / 5) ** 2
        ground = torch.stack([x / size, y / size, 0.5 + 0.3 * torch.sin(x / 3)])
        pictures.append(torch.where(disc, torch.tensor([0.9, 0.2, 0.1])[:, None, None], ground))
    return torch.stack(pictures, 1)[None] * 2 - 1


@torch.no_grad()
def encode(vae: nn.Module, clips: Tensor) -> int:
    """Run the encoder on clips, one at a time; a VAE for pictures gets their frames as a batch.

    Args:
        vae: an autoencoder.
        clips: ``[clips, frames, 3, height, width]`` or pictures ``[clips, 3, height, width]``, in [0, 1].

    Returns:
        How many it took: it may take certain sizes only.
    """
    parameter, taken = next(vae.parameters()), 0
    for clip in clips if clips.ndim == 5 else clips[:, None]:
        frames = (clip.float() * 2 - 1).to(parameter.device, parameter.dtype)
        for x in (frames.movedim(1, 0)[None], frames):
            try:
                vae.encode(x)  # pyright: ignore[reportCallIssue]
            except Exception:  # what a VAE cannot take, it refuses in many ways
                continue
            taken += 1
            break
    return taken


@torch.no_grad()
def round_trip(vae: nn.Module, clip: Tensor) -> Tensor:
    """A clip through encoder and decoder, ``[1, 3, frames, height, width]``; a VAE for pictures gets its frames as a batch.

    Raises:
        UnsupportedError: if it takes neither; with its own words.
    """
    reason = ""
    parameter = next(vae.parameters())
    for x in (clip, clip[0].movedim(1, 0)):
        try:
            latent = _latent(vae.encode(x.to(parameter.device, parameter.dtype)))
            options = {"num_frames": len(latent)} if "num_frames" in inspect.signature(vae.decode).parameters else {}
            out = vae.decode(latent, **options)
        except Exception as error:  # what a VAE cannot take, it refuses in many ways
            reason = reason or f"{type(error).__name__}: {error}"
            continue
        out = (out[0] if isinstance(out, tuple) else out.sample).float()
        return out if out.ndim == 5 else out.movedim(0, 1)[None]
    raise UnsupportedError(f"{type(vae).__name__} takes neither a clip {tuple(clip.shape)} nor its frames as pictures: {reason:.200}")


def fitting_clip(vae: nn.Module) -> Tensor:
    """A small clip that this VAE takes.

    Raises:
        UnsupportedError: if it takes none.
    """
    refused: UnsupportedError | None = None
    for size in CLIP_SIZES:
        clip = moving_clip(*size)
        try:
            round_trip(vae, clip)
        except UnsupportedError as error:
            refused = refused or error
            continue
        return clip
    assert refused is not None
    raise refused


def _latent(encoded: Any) -> Tensor:
    found = getattr(encoded, "latent_dist", None)
    return found.mode() if found is not None else next(_tensors(encoded))


def _tensors(encoded: Any) -> Iterator[Tensor]:
    yield from (value for value in (encoded.values() if isinstance(encoded, dict) else encoded) if isinstance(value, Tensor))


def decibels(reference: Tensor, test: Tensor, peak: float = 2.0) -> float:
    """PSNR in dB; 200 for equal clips."""
    return min(10 * math.log10(peak**2 / max(float((reference - test).square().mean()), 1e-20)), 200.0)
