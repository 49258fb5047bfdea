"""Latents in other sizes: resized along height and width, their low frequencies, noise in their shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resized(clip: Tensor, size: tuple[int, int], enlarge: str) -> Tensor:
    """A clip ``[clips, ..., height, width]`` in another size: by areas if it shrinks."""
    if tuple(clip.shape[-2:]) == size:
        return clip
    mode = "area" if size[0] <= clip.shape[-2] and size[1] <= clip.shape[-1] else enlarge
    pictures = clip.reshape(-1, 1, *clip.shape[-2:])
    made = F.interpolate(pictures, size, mode=mode, **({} if mode == "area" else {"align_corners": False}))
    return made.reshape(*clip.shape[:-2], *size)


def low_band(clip: Tensor) -> Tensor:
    """The low frequencies of a clip: what one level of the Haar transform along height and width leaves, in the clip's size.

    A last row or column of an odd size is a pair of itself.
    """
    high, wide = clip.shape[-2:]
    pictures = F.pad(clip.reshape(-1, 1, high, wide), (0, wide % 2, 0, high % 2), mode="replicate")
    low = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2, mode="nearest")
    return low[..., :high, :wide].reshape(clip.shape)


def noise_like(like: Tensor, seeds: Sequence[int], stage: int) -> Tensor:
    """White noise in the shape of latents, from the seeds of the clips and the number of the stage."""
    drawn = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(seed + (stage << 32))) for seed in seeds]
    return torch.stack(drawn).to(like.device)
