"""The figures that evaluation knows, what each says, and which of them one look at a clip gives together.

Definitions, preprocessing and sources: ``docs/metrics.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reelquant._errors import RecipeError, nearest

Kind = Literal["paired", "temporal", "distribution", "text"]
Better = Literal["higher", "lower", "zero", "one", "none"]

KINDS: dict[str, str] = {
    "paired": "clip against clip, same prompt and noise",
    "temporal": "how a clip moves",
    "distribution": "one set of clips against another",
    "text": "clip against its text",
}


@dataclass(frozen=True)
class Metric:
    """One figure of an evaluation.

    Attributes:
        title: what tables call it.
        kind: what is compared with what, see :data:`KINDS`.
        unit: of the value; empty if it has none.
        better: where good values lie; ``zero`` and ``one`` are for deviations and ratios, ``none`` for figures that
            only describe.
        about: one sentence for people.
        source: the mechanism that gives it, a key of :data:`reelquant.evidence.mechanisms.MECHANISMS`.
        digits: decimals in tables.
    """

    title: str
    kind: Kind
    unit: str
    better: Better
    about: str
    source: str
    digits: int = 3


METRICS: dict[str, Metric] = {
    "psnr": Metric("PSNR", "paired", "dB", "higher", "10 log10(1 / mse) over all pixels of the clip, 100 for equal clips", "psnr", 1),
    "ssim": Metric("SSIM", "paired", "", "higher", "structural similarity of frames, Gaussian window of 11 pixels", "ssim", 4),
    "lpips_alex": Metric("LPIPS (alex)", "paired", "", "lower", "perceptual distance of frames through AlexNet", "lpips-alex", 4),
    "lpips_vgg": Metric("LPIPS (vgg)", "paired", "", "lower", "perceptual distance of frames through VGG16", "lpips-vgg", 4),
    "latent_error": Metric(
        "Latent error", "paired", "", "lower", "distance of the final latents over the length of the reference's", "latents", 4
    ),
    "color_shift": Metric("Colour shift", "paired", "Delta E", "lower", "distance of the mean colours, CIE 1976", "temporal", 2),
    "black_frames": Metric("Black frames", "paired", "per clip", "lower", "black here and not in the reference", "temporal", 2),
    "constant_frames": Metric("One-colour frames", "paired", "per clip", "lower", "of one colour, unlike the reference", "temporal", 2),
    "saturated_frames": Metric("Saturated frames", "paired", "per clip", "lower", "burnt out here, not in the reference", "temporal", 2),
    "sharpness_deviation": Metric("Sharpness deviation", "paired", "", "zero", "fine detail over the reference's, minus 1", "temporal"),
    "checkerboard_deviation": Metric(
        "Checkerboard deviation", "paired", "levels", "zero", "energy of alternating pixels, minus the reference's", "temporal", 2
    ),
    "motion_deviation": Metric(
        "Motion deviation", "temporal", "", "zero", "motion energy over the reference's, minus 1: -0.5 is half the motion", "temporal"
    ),
    "motion_energy": Metric("Motion energy", "temporal", "", "none", "mean change from frame to frame", "temporal", 5),
    "tempo": Metric("Tempo", "temporal", "", "one", "speed of play against the reference: 0.5 is slow motion", "temporal", 2),
    "dropped": Metric("Dropped frames", "temporal", "", "lower", "transitions that stand still where the reference moves", "temporal"),
    "grain": Metric("Grain", "temporal", "levels", "none", "noise in flat areas, in levels of 255", "temporal", 2),
    "grain_deviation": Metric("Grain deviation", "temporal", "levels", "zero", "grain minus the reference's", "temporal", 2),
    "flicker": Metric("Flicker", "temporal", "levels", "none", "change that comes and goes from frame to frame", "temporal", 2),
    "flicker_deviation": Metric(
        "Flicker deviation", "temporal", "levels", "zero", "change that comes and goes where the reference has none", "temporal", 2
    ),
    "frame_consistency": Metric("Frame consistency", "temporal", "", "none", "similarity of neighbouring frames", "temporal", 4),
    "length_deviation": Metric("Length", "temporal", "", "zero", "number of frames over the reference's, minus one", "temporal"),
    "warping_error_raft": Metric(
        "Warping error (RAFT)", "temporal", "", "none", "change of a frame after its motion is undone by RAFT's flow", "warping-raft", 5
    ),
    "warping_error_dis": Metric(
        "Warping error (DIS)", "temporal", "", "none", "change of a frame after its motion is undone by a classical flow", "warping-dis", 5
    ),
    "fvd": Metric("FVD", "distribution", "", "lower", "Frechet distance of I3D features to the reference's clips (FVD-FP16)", "fvd", 2),
    "fid": Metric("FID", "distribution", "", "lower", "Frechet distance of Inception features of frames to the reference's", "fid", 2),
    "kid": Metric("KID", "distribution", "", "lower", "kernel distance of Inception features of frames to the reference's", "kid", 5),
    "fvd_data": Metric("FVD to data", "distribution", "", "lower", "Frechet distance of I3D features to clips of real data", "fvd", 1),
    "fid_data": Metric("FID to data", "distribution", "", "lower", "Frechet distance of Inception features to real frames", "fid", 1),
    "kid_data": Metric("KID to data", "distribution", "", "lower", "kernel distance of Inception features to real frames", "kid", 4),
    "clipsim": Metric("CLIPSIM", "text", "", "higher", "cosine of CLIP embeddings, frames against the text", "clip", 4),
    "clip_consistency": Metric("CLIP consistency", "text", "", "higher", "cosine of CLIP embeddings of neighbouring frames", "clip", 4),
    "judge": Metric(
        "Text match",
        "text",
        "",
        "higher",
        "share of shape, colour and motion in the text that a small network, trained on such clips, sees in the clip",
        "judge",
    ),
}

FEW = 256  # clips, below which a distance of sets is mostly bias

# Seconds a clip on a CPU, so only measured when asked for by name or as "all".
SLOW = ("lpips_vgg", "warping_error_raft", "fid", "kid", "fid_data", "kid_data")
GROUPS: dict[str, tuple[str, ...]] = {
    "image": ("psnr", "ssim", "color_shift"),
    "motion": tuple(name for name, metric in METRICS.items() if metric.source == "temporal"),
    "warping_error": ("warping_error_raft", "warping_error_dis"),
    "lpips": ("lpips_alex", "lpips_vgg"),
    "quick": (
        "psnr",
        "ssim",
        "latent_error",
        *(name for name, metric in METRICS.items() if metric.source in ("temporal", "judge")),
    ),
    "default": tuple(name for name in METRICS if name not in SLOW),
    "all": tuple(METRICS),
}


def select(names: Sequence[str]) -> list[str]:
    """Metrics by name or group, in the order of the table.

    Args:
        names: of :data:`METRICS` or :data:`GROUPS`; an item may hold several, separated by commas.

    Raises:
        RecipeError: for a name that is neither, or no name at all.
    """
    asked = [name.strip().lower().replace("-", "_") for item in names for name in item.split(",") if name.strip()]
    known = {**{name: (name,) for name in METRICS}, **GROUPS}
    for name in asked:
        if name not in known:
            raise RecipeError(f"unknown metric '{name}'; {nearest(name, known)} (`reelquant metrics` explains them)")
    chosen = {name for item in asked for name in known[item]}
    if not chosen:
        raise RecipeError(f"no metric was asked for; known: {', '.join(known)}")
    return [name for name in METRICS if name in chosen]
