"""How the frames of a clip relate to each other, as a loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def frame_axis(module: nn.Module, output: Any) -> int | None:
    """Axis of the frames in what a denoiser gives: ``[B, C, F, H, W]`` or ``[B, F, C, H, W]``; None if it gives something else."""
    first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
    if first is None or first.ndim != 5:
        return None
    config = getattr(module, "config", None)
    channels = getattr(config, "out_channels", None) or getattr(config, "in_channels", None)
    return 1 if first.shape[2] == channels != first.shape[1] else 2


def relation(found: Any, wanted: Any, axis: int) -> Tensor:
    """How far the relations of frames are from those of the float model: 0-d.

    The relations of a frame are the softmax of its cosines with all frames; their Kullback-Leibler divergences are summed over the frames.

    Paper: Q-VDiT (arXiv 2505.22167), temporal maintenance distillation. Deviation: the mean over the clips of a call.
    """
    one, other = (
        _log_relations(next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), axis) for output in (wanted, found)
    )
    return (one.exp() * (one - other)).sum((1, 2)).mean()


def _log_relations(output: Tensor, axis: int) -> Tensor:
    """``[clips, frames, frames]``, logarithms."""
    frames = F.normalize(output.float().movedim(axis, 1).flatten(2), dim=-1)
    return torch.log_softmax(frames @ frames.mT, -1)
