"""Exact rewrites of inputs and weights that come before rounding and leave the float output as it was (``narrow_values`` but for
the channels that it leaves out), one file per mechanism. What adds tensors to a layer is a branch, and moving a rewrite into a norm is the
engine's work: neither belongs here."""

from __future__ import annotations

import functools

from reelquant.stages import GroupView, Rewrite, Stage, register
from reelquant.transforms.equalize import Equalize
from reelquant.transforms.mix_frames import MixFrames
from reelquant.transforms.narrow_values import NarrowValues
from reelquant.transforms.permute import Permute
from reelquant.transforms.range_integrate import RangeIntegrate
from reelquant.transforms.rotate import Rotate
from reelquant.transforms.scale import Scale
from reelquant.transforms.scale_search import ScaleSearch
from reelquant.transforms.shift import Shift
from reelquant.transforms.split import Split
from reelquant.transforms.transform import Transform

TRANSFORMS: dict[str, type[Stage]] = {
    "shift": Shift,
    "range_integrate": RangeIntegrate,
    "scale": Scale,
    "scale_search": ScaleSearch,
    "rotate": Rotate,
    "permute": Permute,
    "equalize": Equalize,
    "mix_frames": MixFrames,
    "narrow_values": NarrowValues,
    "split": Split,
}
register_transform = functools.partial(register, TRANSFORMS, "transform")

__all__ = [
    "TRANSFORMS",
    "Equalize",
    "GroupView",
    "MixFrames",
    "NarrowValues",
    "Permute",
    "RangeIntegrate",
    "Rewrite",
    "Rotate",
    "Scale",
    "ScaleSearch",
    "Shift",
    "Split",
    "Transform",
    "register_transform",
]
