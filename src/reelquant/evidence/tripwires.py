"""Stop a run that goes wrong: checks of latents after denoising steps, and of decoded frames.

``find_`` functions give what is wrong as sentences, ``check_`` functions raise on the first of them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from reelquant._errors import CalibrationError
from reelquant.evidence.temporal import BLACK, BROKEN, LEVEL, SATURATED_SHARE

EXPLODED = 50.0  # latents have a standard deviation near 1 in noise and clip; an RMS of 50 is not a clip any more
DEAD = 1e-4  # spread below which latents are one value, relative to their RMS
LATENT_ADVICE = {
    "not finite": "run it in bfloat16 or float32 (float16 overflows), and keep the layer that overflows in floats",
    "exploded": "quantize with more bits or keep inputs float ('layers:' with a pattern), or calibrate with more prompts",
    "constant": "the denoiser returns a constant: look for a zero scale with `reelquant inspect`, or calibrate again",
}
FRAME_ADVICE = {
    "not finite": "decode in float32 and look at the latents first",
    "out of range": "clamp decoded frames to [0, 1]",
    "black": "look at the latents; a safety checker also paints frames black",
    "constant": "look at the latents; a decoder of another pipeline does this too",
    "saturated": "latents are too large: keep more layers in floats, or lower the guidance scale",
}


def find_in_latents(latents: Tensor, step: int, name: str) -> list[str]:
    """What is wrong with the latents after one denoising step; an empty list is fine.

    Args:
        latents: of any shape, one clip or a batch of them.
        step: sampler index, from 0.
        name: of the clip, for the message.

    Returns:
        Sentences with what, where, the value, and what would work.
    """
    where = f"latents of clip '{name}' after step {step}"
    values = latents.detach().float()
    broken = int((~values.isfinite()).sum())
    if not values.numel() or broken:
        share = f"{broken} of {values.numel()} values are NaN or inf"
        return [f"{where}: {share}; {LATENT_ADVICE['not finite']}"]
    size, spread = float(values.square().mean().sqrt()), float(values.std(correction=0))
    found = {
        "exploded": (size > EXPLODED, f"RMS {size:.3g}, above {EXPLODED:g}"),
        "constant": (
            spread <= DEAD * max(size, DEAD),
            f"all values near {float(values.flatten()[0]):.3g} (spread {spread:.2g})",
        ),
    }
    return [f"{where}: {kind}, {value}; {LATENT_ADVICE[kind]}" for kind, (present, value) in found.items() if present]


def check_latents(latents: Tensor, step: int, name: str) -> None:
    """Raise on latents that are NaN or inf, exploded or constant; see :func:`find_in_latents`.

    Raises:
        CalibrationError: with what, where, the value, and what would work.
    """
    _raise_first(find_in_latents(latents, step, name))


def find_in_frames(clip: Tensor, name: str) -> list[str]:
    """What is wrong with decoded frames; an empty list is fine.

    Black, constant and saturated are as in :mod:`reelquant.evidence.temporal`: a small object before a black background
    is not black. A scene may be meant to be so (a fade to black, a title before plain white), so hold it against a
    reference if there is one.

    Args:
        clip: ``[frames, 3, height, width]``, meant to lie in [0, 1].
        name: of the clip, for the message.

    Returns:
        Sentences with what, where, the value, and what would work.
    """
    values = clip.detach().float()
    broken = (~values.isfinite()).flatten(1).any(1)
    if broken.any():
        return [_told("not finite", broken, name, "NaN or inf values")]
    outside = (values < -LEVEL).flatten(1).any(1) | (values > 1 + LEVEL).flatten(1).any(1)
    low, high = float(values.min()), float(values.max())
    found = [_told("out of range", outside, name, f"values from {low:.3g} to {high:.3g}")] if outside.any() else []
    masks = {kind: mask(values.clamp(0, 1)) for kind, mask in BROKEN.items()}
    masks["constant"] &= ~masks["black"]  # one message is enough
    return found + [_told(kind, mask, name, SEEN[kind](values[mask])) for kind, mask in masks.items() if mask.any()]


def check_frames(clip: Tensor, name: str) -> None:
    """Raise on frames that are NaN or inf, out of range, black, of one colour or saturated; see :func:`find_in_frames`.

    Raises:
        CalibrationError: with what, where, the value, and what would work.
    """
    _raise_first(find_in_frames(clip, name))


def _color(frames: Tensor) -> str:
    levels = (frames[0].flatten(1).median(1).values.clamp(0, 1) / LEVEL).round().int().tolist()
    return f"nothing but the colour {tuple(levels)} in the first of them"


SEEN: dict[str, Callable[[Tensor], str]] = {
    "black": lambda frames: f"99.9 % of the pixels are below {BLACK / LEVEL:.0f} of 255",
    "constant": _color,
    "saturated": lambda frames: f"more than {SATURATED_SHARE:.0%} of the pixels have only channels of 0 and 255",
}


def _told(kind: str, mask: Tensor, name: str, value: str) -> str:
    which = mask.nonzero().flatten().tolist()
    listed = ", ".join(map(str, which[:8])) + (f" ... ({len(which)} of {len(mask)})" if len(which) > 8 else "")
    return f"frame{'s' * (len(which) > 1)} {listed} of clip '{name}': {kind}, {value}; {FRAME_ADVICE[kind]}"


def _raise_first(found: list[str]) -> None:
    if found:
        raise CalibrationError(found[0])
