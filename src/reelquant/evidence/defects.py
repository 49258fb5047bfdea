"""Planted defects, and rules that name a defect from figures; together they test what the figures can detect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant._errors import MeasurementError
from reelquant.evidence import temporal
from reelquant.evidence.temporal import LEVEL, check_pair

Figures = dict[str, float]

# ------------------------------------------------------------------------------------------------------------- planting


def _slowed_repeated(clip: Tensor) -> Tensor:
    return clip[torch.arange(len(clip)) // 2]


def _slowed_blended(clip: Tensor) -> Tensor:
    between = (clip[:-1] + clip[1:]) / 2
    return torch.stack([clip[:-1], between], 1).flatten(0, 1)[: len(clip)]


def _dropped(clip: Tensor) -> Tensor:
    """Every fourth frame is the one before it."""
    index = torch.arange(len(clip))
    return clip[torch.where(index % 4 == 3, index - 1, index)]


def _frozen(clip: Tensor) -> Tensor:
    return clip[:1].expand_as(clip).clone()


def _black_frame(clip: Tensor) -> Tensor:
    clip = clip.clone()
    clip[len(clip) // 2] = 0
    return clip


def _checkerboard(clip: Tensor) -> Tensor:
    """A board of +-6 levels whose sign is drawn again for every frame."""
    rows, columns = torch.arange(clip.shape[-2]), torch.arange(clip.shape[-1])
    board = 1.0 - 2.0 * ((rows[:, None] + columns) % 2)
    sign = torch.randint(2, (len(clip), 1, 1, 1), generator=_dice()) * 2.0 - 1
    return (clip + 6 * LEVEL * sign * board).clamp(0, 1)


def _color_shift(clip: Tensor) -> Tensor:
    """A warm cast: red times 1.03 plus 4 levels, blue times 0.95 minus 4 levels."""
    gain, offset = clip.new_tensor([1.03, 1.0, 0.95]), clip.new_tensor([4 * LEVEL, 0.0, -4 * LEVEL])
    return (clip * gain[:, None, None] + offset[:, None, None]).clamp(0, 1)


def _blur(clip: Tensor) -> Tensor:
    """Binomial 5x5, about a Gaussian of sigma 1 pixel."""
    row = clip.new_tensor([1, 4, 6, 4, 1]) / 16
    kernel = (row[:, None] * row).expand(3, 1, 5, 5)
    return F.conv2d(F.pad(clip, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)


def _noise(clip: Tensor) -> Tensor:
    """Sigma 8 levels, 30 dB."""
    return (clip + 8 * LEVEL * torch.randn(clip.shape, generator=_dice())).clamp(0, 1)


def _brightness_flicker(clip: Tensor) -> Tensor:
    """Every frame brighter or darker by a factor drawn from 0.94 to 1.06, and by up to 3 levels."""
    draw = torch.rand(len(clip), generator=_dice())[:, None, None, None] * 2 - 1
    return (clip * (1 + 0.06 * draw) + 3 * LEVEL * draw).clamp(0, 1)


def _flicker(clip: Tensor) -> Tensor:
    """Smooth spots of about 8 pixels, sigma 6 levels, other ones in every frame, as jitter of latent cells decodes."""
    frames, _, height, width = clip.shape
    cells = torch.randn(frames, 1, -(-height // 8), -(-width // 8), generator=_dice())
    spots = F.interpolate(cells, (height, width), mode="bilinear")
    return (clip + 6 * LEVEL * spots / spots.std()).clamp(0, 1)


def _reversed(clip: Tensor) -> Tensor:
    return clip.flip(0)


def _dice() -> torch.Generator:
    return torch.Generator().manual_seed(0)


PLANT: dict[str, Callable[[Tensor], Tensor]] = {
    "slowed_repeated": _slowed_repeated,
    "slowed_blended": _slowed_blended,
    "dropped": _dropped,
    "frozen": _frozen,
    "reversed": _reversed,
    "black_frame": _black_frame,
    "checkerboard": _checkerboard,
    "color_shift": _color_shift,
    "blur": _blur,
    "noise": _noise,
    "brightness_flicker": _brightness_flicker,
    "flicker": _flicker,
}
"""Defects by name: functions from a clip ``[frames, 3, height, width]`` in [0, 1] to one of the same shape."""

# Defects that a clip without motion cannot have.
OVER_TIME = ("slowed_repeated", "slowed_blended", "dropped", "frozen", "reversed")
# Names in :func:`diagnose` that differ from those in PLANT.
CALLED = {"slowed_repeated": "slowed", "slowed_blended": "slowed"}

# -------------------------------------------------------------------------------------------------------------- figures

SINGLE: dict[str, Callable[[Tensor], float]] = {
    "motion_energy": lambda clip: float(temporal.motion_energy(clip).mean()),
    "flicker": temporal.flicker,
    "brightness_flicker": temporal.brightness_flicker,
    "frame_consistency": lambda clip: float(temporal.frame_consistency(clip).mean()),
    "grain": temporal.grain,
    "checkerboard": temporal.checkerboard,
    "blockiness": temporal.blockiness,
    "sharpness": temporal.sharpness,
    "frozen": lambda clip: float(temporal.frozen(clip).double().mean()),
}
PAIRED: dict[str, Callable[[Tensor, Tensor], float]] = {
    "motion_deviation": temporal.motion_deviation,
    "flicker_deviation": temporal.flicker_deviation,
    "color_shift": temporal.color_shift,
    "dropped": temporal.dropped,
}
DIFFERENT = ("motion_energy", "flicker")  # whose deviations are differences only among PAIRED


def figures(reference: Tensor, test: Tensor) -> Figures:
    """All figures of :mod:`~reelquant.evidence.temporal` for two clips ``[frames, 3, height, width]``, frames > 1.

    Returns:
        The test's own figures under their names, ``NAME_deviation`` (test minus reference, in the same unit; of
        ``motion`` and ``sharpness`` relative to the reference; of ``flicker`` see
        :func:`~reelquant.evidence.temporal.flicker_deviation`), the paired figures, and counts of frames that only the test has broken.

    Raises:
        MeasurementError: if the shapes differ or there is one frame only.
    """
    check_pair(reference, test)
    if len(reference) < 2:
        raise MeasurementError(f"figures over time need at least 2 frames, got {len(reference)}; sample longer clips")
    reference, test = reference.detach().float().cpu(), test.detach().float().cpu()
    before = {name: measure(reference) for name, measure in SINGLE.items()}
    after = {name: measure(test) for name, measure in SINGLE.items()}
    change = {f"{name}_deviation": after[name] - before[name] for name in SINGLE if name not in DIFFERENT}
    change["sharpness_deviation"] /= before["sharpness"] + 1  # one level: flat frames give 0
    speed, confidence = temporal.tempo(reference, test)
    return {
        **after,
        **change,
        **{name: measure(reference, test) for name, measure in PAIRED.items()},
        "tempo": speed,
        "tempo_confidence": confidence,
        **{f"{name}_frames": float(count) for name, count in temporal.newly_broken(reference, test).items()},
    }


# ------------------------------------------------------------------------------------------------------------ diagnosis

# Each lies between the largest figure of harmless changes and the smallest of the planted defect, on 49 clips; see
# docs/metrics.md.
SURE = 0.5  # confidence above which the tempo counts
SLOW = 0.8  # times the reference's speed
BACKWARD = -0.5  # times the reference's speed
DROPPED = 0.05  # share of the transitions
STANDING = 0.95  # share of the transitions that are frozen
LESS_MOTION = -0.5  # relative motion deviation
BOARD = 1.6  # levels
NOISE = 3.5  # levels of sigma
BLUR = -0.25  # relative sharpness deviation
COLOR = 1.8  # Delta E; a little below what people just see, which is 2.3
BRIGHTNESS = 0.4  # levels
WHOLE = 0.3  # share of a pixel's flicker that whole frames must have in common to be the cause
FLICKER = 3.1  # levels


@dataclass(frozen=True)
class Defect:
    """A defect that figures look like.

    Attributes:
        name: one of the keys of :data:`RULES`.
        sentence: what is seen, with the figures.
        strength: the figure in units of the rule's threshold, 1 or more; unitless, and not comparable between defects.
    """

    name: str
    sentence: str
    strength: float


@dataclass(frozen=True)
class Rule:
    """How a defect shows.

    Attributes:
        strength: of the defect, from the figures; it is there from 1 on.
        sentence: with figures in braces, as :meth:`str.format_map` fills them.
        hides: defects that this one causes, which are therefore not reported beside it.
    """

    strength: Callable[[Figures], float]
    sentence: str
    hides: tuple[str, ...] = ()


def _reaches(name: str, threshold: float) -> Callable[[Figures], float]:
    """A figure in units of its threshold, both of the same sign."""
    return lambda figures: figures[name] / threshold


def _slowed(figures: Figures) -> float:
    return (1 - figures["tempo"]) / (1 - SLOW) * (figures["tempo_confidence"] >= SURE)


def _backward(figures: Figures) -> float:
    return figures["tempo"] / BACKWARD * (figures["tempo_confidence"] >= SURE)


def _standing(figures: Figures) -> float:
    """Frozen throughout, and less so in the reference: what lacks is at least half of its motion."""
    return min(figures["frozen"] / STANDING, figures["motion_deviation"] / LESS_MOTION)


def _of_one_color(figures: Figures) -> float:
    return figures["constant_frames"] - figures["black_frames"]  # black frames are of one colour too


def _of_whole_frames(figures: Figures) -> float:
    return figures["brightness_flicker_deviation"] / max(BRIGHTNESS, WHOLE * figures["flicker_deviation"])


RULES: dict[str, Rule] = {
    "frozen": Rule(
        _standing,
        "frozen: {frozen:.0%} of the transitions change nothing",
        ("slowed", "less_motion", "dropped", "color_shift", "blur"),
    ),
    "reversed": Rule(
        _backward,
        "reversed: plays backward at {tempo:.2f} of the reference's speed",
        ("slowed", "dropped", "less_motion", "color_shift", "blur"),
    ),
    "slowed": Rule(
        _slowed,
        "slowed motion: plays at {tempo:.2f} of the reference's speed",
        ("less_motion", "dropped", "color_shift", "blur", "flicker"),
    ),
    "dropped": Rule(
        _reaches("dropped", DROPPED),
        "dropped frames: {dropped:.0%} of the transitions repeat a frame where the reference moves",
        ("flicker",),
    ),
    "less_motion": Rule(
        _reaches("motion_deviation", LESS_MOTION),
        "less motion: motion energy {motion_deviation:+.0%} against the reference",
    ),
    "black_frame": Rule(
        _reaches("black_frames", 1),
        "black frames: {black_frames:.0f} that the reference does not have",
        ("brightness_flicker", "flicker", "color_shift"),
    ),
    "constant_frame": Rule(
        _of_one_color,
        "frames of one colour: {constant_frames:.0f} that the reference does not have",
        ("brightness_flicker", "flicker", "color_shift"),
    ),
    "saturated_frame": Rule(
        _reaches("saturated_frames", 1),
        "saturated frames: {saturated_frames:.0f} that the reference does not have",
    ),
    "checkerboard": Rule(
        _reaches("checkerboard_deviation", BOARD),
        "checkerboard: {checkerboard_deviation:+.1f} levels at the pixel grid",
        ("noise", "flicker"),
    ),
    "noise": Rule(
        _reaches("grain_deviation", NOISE),
        "noise: grain {grain_deviation:+.1f} levels to {grain:.1f} in flat areas",
        ("flicker",),
    ),
    "blur": Rule(
        _reaches("sharpness_deviation", BLUR),
        "blur: sharpness {sharpness_deviation:+.0%} against the reference",
    ),
    "color_shift": Rule(
        _reaches("color_shift", COLOR),
        "colour shift: the mean colour is Delta E {color_shift:.1f} away",
    ),
    "brightness_flicker": Rule(
        _of_whole_frames,
        "flickering brightness: {brightness_flicker_deviation:+.1f} levels from frame to frame",
        ("flicker",),
    ),
    "flicker": Rule(
        _reaches("flicker_deviation", FLICKER),
        "flicker: {flicker_deviation:+.1f} levels per pixel from frame to frame",
    ),
}
"""How every defect shows, by name, in the order of reports."""


def diagnose(figures: Figures) -> list[Defect]:
    """Which defects the figures of a pair look like; empty for changes that people do not notice.

    Args:
        figures: of :func:`figures`.

    Returns:
        The defects in the order of :data:`RULES`, from those of time to those of single pixels, without what another
        one explains.
    """
    strengths = {name: rule.strength(figures) for name, rule in RULES.items()}
    seen = {name: strength for name, strength in strengths.items() if strength >= 1}
    hidden = {name for cause in seen for name in RULES[cause].hides}
    return [Defect(name, RULES[name].sentence.format_map(figures), strength) for name, strength in seen.items() if name not in hidden]
