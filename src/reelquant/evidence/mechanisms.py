"""The functions behind the figures of :mod:`reelquant.evidence.metrics`, and the weights and packages they need."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelquant._errors import CheckpointError, UnsupportedError
from reelquant.evidence import defects, temporal
from reelquant.evidence.fidelity import psnr, ssim
from reelquant.evidence.metrics import METRICS
from reelquant.evidence.networks import published, weights
from reelquant.evidence.text import CLIP
from reelquant.evidence.warping import dis_flow, warping_error


@dataclass(frozen=True)
class Pair:
    """A clip under test and the clip it is compared with; both ``[frames, 3, height, width]`` in [0, 1].

    Attributes:
        reference: of the same prompt and noise; the test clip itself where the reference is measured.
        test: as many frames as the reference.
        prompt: the text, if known.
        frames: numbers of frames before they were cut to equal length, of the reference and of the test.
    """

    reference: Tensor
    test: Tensor
    prompt: str | None = None
    frames: tuple[int, int] = (0, 0)


@dataclass
class Tools:
    """What the mechanisms share: networks, loaded when they are first used, and where to find and run them."""

    weights: Path | None = None
    device: str = "cpu"
    clip_model: str = CLIP
    fid_frames: int = 0  # of a clip, evenly spaced, that FID and KID look at; 0 for all
    _loaded: dict[str, Any] = field(default_factory=dict)

    def network(self, name: str) -> Any:
        """A network by the name of its weights."""
        if name not in self._loaded:
            self._loaded[name] = weights.load(name, self.weights).to(self.device)
        return self._loaded[name]

    @cached_property
    def clip(self) -> Any:
        """The CLIP that text figures use."""
        from reelquant.evidence.text import load_clip

        local = None if self.weights is None else self.weights / "clip"
        source = str(local) if local is not None and local.is_dir() else self.clip_model
        return load_clip(source, download=source != CLIP)  # the hub is asked for a model that was named, not for the default


@dataclass(frozen=True)
class Mechanism:
    """How a source of figures looks at clips.

    Attributes:
        figures: figures of one pair by metric name; None for sources of features.
        features: ``[rows, dim]`` of one clip, and the key they are stored under; None for sources of figures.
        alone: the figures also say something about a clip without a reference.
        weights: key of :data:`reelquant.evidence.networks.published.WEIGHTS` that must be found.
        available: says in a sentence why the mechanism cannot look at clips of these texts; None if it can.
    """

    figures: Callable[[Tools, Pair], dict[str, float]] | None = None
    features: tuple[str, Callable[[Tools, Tensor], Tensor]] | None = None
    alone: bool = False
    weights: str | None = None
    available: Callable[[Tools, Sequence[str] | None], str | None] = lambda tools, prompts: None

    def missing(self, tools: Tools, prompts: Sequence[str] | None) -> str | None:
        """Why the mechanism cannot be used here, with the command that helps; None if it can."""
        if self.weights is not None and weights.find(self.weights, tools.weights) is None:
            return published.missing(self.weights)
        return self.available(tools, prompts)


# --- figures ----------------------------------------------------------------------------------------------------------


def _psnr(tools: Tools, pair: Pair) -> dict[str, float]:
    return {"psnr": float(psnr(pair.reference[None], pair.test[None]))}


def _ssim(tools: Tools, pair: Pair) -> dict[str, float]:
    if min(pair.test.shape[-2:]) < 11:
        raise UnsupportedError(f"SSIM needs frames of at least 11x11 pixels, got {pair.test.shape[-1]}x{pair.test.shape[-2]}")
    return {"ssim": ssim(pair.reference, pair.test)}


def _lpips(name: str) -> Callable[[Tools, Pair], dict[str, float]]:
    metric = name.replace("-", "_")

    def measured(tools: Tools, pair: Pair) -> dict[str, float]:
        network = tools.network(name)
        with torch.inference_mode():
            return {metric: float(network.distances(pair.reference.to(tools.device), pair.test.to(tools.device)).mean())}

    return measured


def _temporal(tools: Tools, pair: Pair) -> dict[str, float]:
    if len(pair.test) < 2:
        raise UnsupportedError(f"figures over time need at least 2 frames, got {len(pair.test)}")
    reference, test = pair.frames
    found = defects.figures(pair.reference, pair.test) | {"length_deviation": test / reference - 1 if reference else 0.0}
    if found["tempo_confidence"] < defects.SURE:
        del found["tempo"]  # a clip that hardly moves has none
    return found


def _warping_raft(tools: Tools, pair: Pair) -> dict[str, float]:
    flow = tools.network("raft").flow
    with torch.inference_mode():
        return {"warping_error_raft": _mean(warping_error(pair.test.to(tools.device), flow))}


def _warping_dis(tools: Tools, pair: Pair) -> dict[str, float]:
    return {"warping_error_dis": _mean(warping_error(pair.test, dis_flow))}


def _clip(tools: Tools, pair: Pair) -> dict[str, float]:
    from reelquant.evidence.text import clip_scores

    return clip_scores(pair.test, pair.prompt or "", tools.clip)


def _judge(tools: Tools, pair: Pair) -> dict[str, float]:
    from reelquant.models.judge import accuracy

    found = accuracy(pair.test[None], [pair.prompt or ""])
    return {"judge": sum(found.values()) / len(found)} if found else {}


def _mean(values: Tensor) -> float:
    """Over transitions that have a figure: at a cut, no pixel is seen twice."""
    known = values[values.isfinite()]
    return float(known.mean()) if known.numel() else 0.0


# --- features ---------------------------------------------------------------------------------------------------------


def _i3d(tools: Tools, clip: Tensor) -> Tensor:
    with torch.inference_mode():
        return tools.network("i3d").features(clip[None].to(tools.device)).cpu().clone()


def _inception(tools: Tools, clip: Tensor) -> Tensor:
    chosen = torch.linspace(0, len(clip) - 1, min(tools.fid_frames or len(clip), len(clip))).round().long()
    with torch.inference_mode():
        return tools.network("inception").features(clip[chosen].to(tools.device)).cpu().clone()


# --- requirements ----------------------------------------------------------------------------------------------------


def _needs_cv2(tools: Tools, prompts: Sequence[str] | None) -> str | None:
    return None if importlib.util.find_spec("cv2") else "needs OpenCV: pip install opencv-python-headless"


def _needs_clip(tools: Tools, prompts: Sequence[str] | None) -> str | None:
    if prompts is None:
        return "needs the texts of the clips: --prompts FILE"
    try:
        _ = tools.clip
    except (CheckpointError, UnsupportedError) as error:
        return str(error)
    return None


def _needs_captions(tools: Tools, prompts: Sequence[str] | None) -> str | None:
    from reelquant.models.shapes import understood

    if understood(prompts or ()):
        return None
    return "text match is measured on captions of the bundled pipelines only: moving shapes and digits"


MECHANISMS: dict[str, Mechanism] = {
    "psnr": Mechanism(_psnr),
    "ssim": Mechanism(_ssim),
    "lpips-alex": Mechanism(_lpips("lpips-alex"), weights="lpips-alex"),
    "lpips-vgg": Mechanism(_lpips("lpips-vgg"), weights="lpips-vgg"),
    "temporal": Mechanism(_temporal, alone=True),
    "warping-raft": Mechanism(_warping_raft, alone=True, weights="raft"),
    "warping-dis": Mechanism(_warping_dis, alone=True, available=_needs_cv2),
    "clip": Mechanism(_clip, alone=True, available=_needs_clip),
    "judge": Mechanism(_judge, alone=True, available=_needs_captions),
    "fvd": Mechanism(features=("i3d", _i3d), alone=True, weights="i3d"),
    "fid": Mechanism(features=("inception", _inception), alone=True, weights="inception"),
    "kid": Mechanism(features=("inception", _inception), alone=True, weights="inception"),
}


def sources(names: Sequence[str]) -> list[str]:
    """The mechanisms behind some metrics; ``latents`` is not among them, for it looks at no clip."""
    found = dict.fromkeys(METRICS[name].source for name in names)
    return [name for name in found if name in MECHANISMS]


def curves(pair: Pair) -> dict[str, list[float]]:
    """Figures frame by frame, for pictures: PSNR per frame and change per transition."""
    error = (pair.test.double() - pair.reference.double()).square().flatten(1).mean(1)
    return {
        "psnr": [round(x, 3) for x in (-10 * error.clamp(min=1e-10).log10()).tolist()],
        "motion_energy": [round(x, 7) for x in temporal.motion_energy(pair.test).tolist()],
    }
