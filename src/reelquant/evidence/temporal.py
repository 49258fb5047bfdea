"""What moves, flickers, freezes and drifts in a clip, and how that differs from a reference clip.

Clips are ``[frames, 3, height, width]`` in [0, 1]; "levels" are steps of 1/255. A figure of one clip means little by
itself (a still scene has no motion energy and a field of grass has much grain), so every one is made to be compared
with the same figure of a reference that started from the same noise. Nothing here needs weights. ``docs/metrics.md``
states every figure with its limits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant._errors import MeasurementError

LEVEL = 1 / 255
POOL = 4  # pixels; motion is measured on means of 4x4 pixels, in which grain is a quarter as strong as in pixels
BLOCK = 8  # pixels; the side of the areas that :func:`frozen` and :func:`checkerboard` look at
MOTION_FLOOR = LEVEL**2  # energy of a change by one level everywhere: what coding alone may do to a still scene
EVEN = MOTION_FLOOR / 10  # cost of a step that is one frame longer or shorter than one frame
THUMBNAIL = 32  # pixels of the longer side of the pictures that :func:`tempo` matches
FROZEN = 1.0  # levels; a transition is frozen if no block's mean changes by more
MOVING = 3.0  # levels; a transition moves if some block's mean changes by more; in between it is neither
FLAT_SHARE = 0.5  # of a frame's pixels, those of the lowest gradient, count as flat
REMNANT = 0.25  # a dropped transition keeps less than this share of the reference's largest change
SPECKS = 0.001  # share of the pixels that may stick out of a black or constant frame; four of 64x64
BLACK = 16 * LEVEL  # a pixel is black if its brightest channel is below; the bundled black background is at 7.7 levels
CONSTANT = 4 * LEVEL  # a frame is constant if no channel strays further from its median over the frame
SATURATED_SHARE = 0.8  # of the pixels; a frame is saturated if more have every channel at 0 or 1, not all 0

FaultMask = Callable[[Tensor], Tensor]


def check_pair(reference: Tensor, test: Tensor) -> None:
    """Refuse a pair of clips that cannot be compared frame by frame.

    Raises:
        MeasurementError: if the shapes differ or are not ``[frames, 3, height, width]``.
    """
    if reference.ndim != 4 or reference.shape[1] != 3:
        raise MeasurementError(f"a clip is [frames, 3, height, width], not {list(reference.shape)}")
    if reference.shape != test.shape:
        raise MeasurementError(
            f"clips of different shapes cannot be compared: {tuple(reference.shape)} and {tuple(test.shape)}; cut or scale one of them"
        )


def luma(clip: Tensor) -> Tensor:
    """Brightness ``[frames, height, width]`` in [0, 1]: weights of BT.709 on gamma-encoded values."""
    return (clip * clip.new_tensor([0.2126, 0.7152, 0.0722])[:, None, None]).sum(1)


def pooled(clip: Tensor, side: int) -> Tensor:
    """Means over squares of at most ``side`` pixels; what is left at the right and the bottom edge is left out."""
    return F.avg_pool2d(clip, (min(side, clip.shape[-2]), min(side, clip.shape[-1])))


# --------------------------------------------------------------------------------------------------------------- motion


def motion_energy(clip: Tensor) -> Tensor:
    """Mean squared change of the 4x4 means between frames, float64 ``[frames - 1]`` (1: all black to all white).

    Squared, because independent noise then adds a known constant (2 sigma^2 / 16) instead of bending the figure; of 4x4
    means, so that this constant is small beside motion.
    """
    small = pooled(clip.float(), POOL).double()
    return small.diff(dim=0).square().flatten(1).mean(1)


def motion_deviation(reference: Tensor, test: Tensor) -> float:
    """How much more (+) or less (-) the test moves: difference of the mean motion energies relative to the reference's.

    ``(test - reference) / (reference + floor)``, floor the energy of one level everywhere: -1 is a frozen clip, and a
    still reference gives 0 against a still test and a large, finite figure against a moving one.

    Raises:
        MeasurementError: if the shapes differ.
    """
    check_pair(reference, test)
    if len(reference) < 2:
        return 0.0
    before, after = motion_energy(reference).mean(), motion_energy(test).mean()
    return float((after - before) / (before + MOTION_FLOOR))


def largest_change(clip: Tensor) -> Tensor:
    """Largest change of an 8x8 block's mean in any channel from each frame to the next, in levels, ``[frames - 1]``.

    The largest and not the mean, so that a small object that moves before a still background counts as motion.
    """
    return (
        pooled(clip.float(), BLOCK).double().diff(dim=0).abs().flatten(1).amax(1) / LEVEL if len(clip) > 1 else clip.new_zeros(0).double()
    )


def frozen(clip: Tensor) -> Tensor:
    """Which transitions change nothing beyond coding noise: bool ``[frames - 1]``."""
    return largest_change(clip) <= FROZEN


def dropped(reference: Tensor, test: Tensor) -> float:
    """Share of all transitions, unitless, that are frozen in the test and move in the reference.

    Raises:
        MeasurementError: if the shapes differ.
    """
    check_pair(reference, test)
    before, after = largest_change(reference), largest_change(test)
    lost = (after <= FROZEN) & (before > MOVING) & (after < REMNANT * before)
    return float(lost.double().mean()) if len(lost) else 0.0


# ---------------------------------------------------------------------------------------------------------------- tempo


def tempo(reference: Tensor, test: Tensor) -> tuple[float, float]:
    """Speed of the test relative to the reference, and how far that can be trusted.

    Every test frame is matched to the nearest point of the polygon through the reference's frames (pictures of at most
    32 pixels), in an order that only goes forward, or only backward where that fits clearly better; the speed is the
    median slope over all pairs of test frames (Theil-Sen). Mean colours do not count. Where nothing moves, and all
    matches are alike, the speed is 1.

    Returns:
        The speed (1 as the reference, 0.5 half as fast, 0 frozen, -1 reversed), and a confidence in [0, 1]: the median
        over the test frames of how much nearer the matched point is than the reference's frames are on average. Still
        and unrelated clips get a low one.

    Raises:
        MeasurementError: if the shapes differ.
    """
    check_pair(reference, test)
    if len(reference) < 3:
        return 1.0, 0.0
    known, asked = _thumbnails(reference), _thumbnails(test)
    average = torch.cdist(asked, known).square().mean(1)
    forward, cost = _monotone_match(known, asked)
    backward, reverse_cost = _monotone_match(known.flip(0), asked)
    if float(reverse_cost.median()) + MOTION_FLOOR < 0.5 * float(cost.median()):
        forward, cost = len(known) - 1 - backward, reverse_cost
    confidence = ((average - cost) / (average + MOTION_FLOOR)).median().clamp(0, 1)
    return _median_slope(forward), float(confidence)


def _thumbnails(clip: Tensor) -> Tensor:
    """``[frames, values]`` less the mean colour, scaled so that a squared distance is a mean squared difference."""
    side = -(-max(clip.shape[-2:]) // THUMBNAIL)
    small = pooled(clip.float(), side).double()
    small = (small - small.mean((2, 3), keepdim=True)).flatten(1)
    return small / small.shape[1] ** 0.5


def _monotone_match(known: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the asked frames on the polygon through the known ones, in order, and squared distances to it."""
    ahead = known.diff(dim=0)
    length = ahead.square().sum(1)
    offset = asked @ ahead.mT - (known[:-1] * ahead).sum(1)  # how far along each segment, times its length
    along = (offset / length.clamp(min=1e-12)).clamp(0, 1)
    away = torch.cdist(asked, known[:-1]).square()
    distance = (away - 2 * along * offset + along.square() * length).clamp(min=0)
    position = along + torch.arange(len(ahead))
    path = _cheapest_path(distance, position)
    rows = torch.arange(len(asked))
    return position[rows, path], distance[rows, path]


def _cheapest_path(cost: Tensor, position: Tensor) -> Tensor:
    """A segment for every row of ``[rows, segments]``, never decreasing, with the smallest sum of costs.

    A small cost of uneven speed decides what pixels leave open: still scenes run at speed 1, and of the many passes of
    a bouncing ball the next one is taken.
    """
    back = torch.tril(torch.full((cost.shape[1], cost.shape[1]), torch.inf, dtype=cost.dtype), -1)
    best, came = cost[0] + EVEN * position[0].square(), []
    for row in range(1, len(cost)):
        step = position[row][None] - position[row - 1][:, None]
        lowest, origin = (best[:, None] + back + EVEN * (step - 1).square()).min(0)
        came.append(origin)
        best = lowest + cost[row]
    path = [int(best.argmin())]
    for origin in reversed(came):
        path.append(int(origin[path[-1]]))
    return torch.tensor(path[::-1])


def _median_slope(position: Tensor) -> float:
    first, second = torch.triu_indices(len(position), len(position), 1)
    return float(((position[second] - position[first]) / (second - first)).quantile(0.5))


# ---------------------------------------------------------------------------------------------- flicker and consistency


def spikes(series: Tensor) -> Tensor:
    """Each value minus the median of itself and its two neighbours in time: ``[frames - 2, ...]``.

    Zero wherever the series only rises or only falls, so edges that pass, fades and smooth motion leave nothing.
    """
    before, now, after = series[:-2], series[1:-1], series[2:]
    middle = torch.maximum(torch.minimum(before, now), torch.minimum(torch.maximum(before, now), after))
    return now - middle


def flicker(clip: Tensor) -> float:
    """RMS over pixels and inner frames of how far a frame exceeds both its neighbours, in levels; see :func:`spikes`.

    This is the temporal energy near the Nyquist frequency (one frame up, one frame down) without what a passing edge
    has of it: differences of second or third order, and the Fourier transform, count a step as much as a flash.
    """
    if len(clip) < 3:
        return 0.0
    energy = [spikes(clip[i : i + 3].double()).square().mean() for i in range(len(clip) - 2)]
    return float(torch.stack(energy).mean().sqrt()) / LEVEL


def flicker_deviation(reference: Tensor, test: Tensor) -> float:
    """How much more (+) or less (-) the test flickers, in levels: what of :func:`flicker` comes and goes at places of its own.

    With ``e`` the RMS of the test's spikes in a square of 4x4 pixels of one frame, minus that of the reference's, this is the signed root
    of ``mean(sign(e) e^2)``. Over a reference that does not spike it is the test's flicker, and independent noise adds its own. What moves
    up and down by itself within three frames, as a ball that bounces, spikes alike in both clips and leaves little, whatever its
    contrast, and if an edge of it lands a pixel further. The difference of the two flickers' squares, which this replaces, counts one
    percent of contrast in such a clip as five levels, and takes noise beside its object for less flicker.

    Raises:
        MeasurementError: if the shapes differ.
    """
    check_pair(reference, test)
    if len(reference) < 3:
        return 0.0

    def local(clip: Tensor, start: int) -> Tensor:
        return pooled(spikes(clip[start : start + 3].double()).square(), POOL).sqrt()

    more = [local(test, i) - local(reference, i) for i in range(len(reference) - 2)]
    mean = torch.stack([(one * one.abs()).mean() for one in more]).mean()
    return float(mean.sign() * mean.abs().sqrt()) / LEVEL


def brightness_flicker(clip: Tensor) -> float:
    """RMS over the inner frames of how far a frame's mean luma exceeds both its neighbours, in levels."""
    if len(clip) < 3:
        return 0.0
    return float(spikes(luma(clip.float()).double().mean((1, 2))).square().mean().sqrt()) / LEVEL


def frame_consistency(clip: Tensor) -> Tensor:
    """SSIM of each frame's luma with the next one's, float64 ``[frames - 1]``; 1 for equal frames.

    Uniform windows of 7x7 pixels inside the frame (smaller for smaller frames) and the constants of Wang et al. 2004,
    so the figures lie near those with the usual Gaussian window but do not equal them.
    """
    frames = luma(clip.float()).double()
    pairs = [_similarity(first, second) for first, second in itertools.pairwise(frames)]
    return torch.stack(pairs) if pairs else frames.new_zeros(0)


def _similarity(first: Tensor, second: Tensor) -> Tensor:
    window = (min(7, first.shape[-2]), min(7, first.shape[-1]))
    x, y, xx, yy, xy = F.avg_pool2d(
        torch.stack([first, second, first * first, second * second, first * second])[:, None],
        window,
        stride=1,
    )
    bright, contrast = 0.01**2, 0.03**2
    alike = (2 * x * y + bright) / (x * x + y * y + bright)
    return (alike * (2 * (xy - x * y) + contrast) / (xx - x * x + yy - y * y + contrast)).mean()


# -------------------------------------------------------------------------------------------------------- single frames


def grain(clip: Tensor) -> float:
    """Standard deviation of the noise in flat areas, in levels; mean over frames and channels.

    Immerkaer's estimate from the mean absolute response of [[1, -2, 1], [-2, 4, -2], [1, -2, 1]], taken over the half
    of each frame's pixels whose surroundings have the lowest gradient. Fine texture counts as noise where it fills even
    that half.

    Paper:
        Immerkaer 1996, "Fast Noise Variance Estimation". Theirs takes all pixels; ours leaves out the steeper half.
    """
    if min(clip.shape[-2:]) < 3:
        return 0.0
    return float(torch.stack([_frame_grain(frame[:, None].double()) for frame in clip]).mean()) / LEVEL


def _frame_grain(frame: Tensor) -> Tensor:
    rise = frame.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    ripple = frame.new_tensor([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    response = F.conv2d(frame, torch.stack([rise, rise.mT, ripple])[:, None])
    slope = F.avg_pool2d(response[:, :2].square().sum(1).mean(0)[None], 5, 1, 2, count_include_pad=False)[0]
    flat = slope <= slope.flatten().kthvalue(max(1, int(slope.numel() * FLAT_SHARE))).values
    return (response[:, 2].abs().mean(0) * flat).sum() / flat.sum() * (torch.pi / 2) ** 0.5 / 6


def checkerboard(clip: Tensor) -> float:
    """Amplitude of the pattern that alternates with every pixel, in levels: RMS over 8x8 blocks and frames.

    The mean over a block of the frame times (-1)^(x + y): a board of +-a gives a, and noise of sigma only sigma / 8.
    """
    rows, columns = torch.arange(clip.shape[-2]), torch.arange(clip.shape[-1])
    sign = 1.0 - 2.0 * ((rows[:, None] + columns) % 2).double()
    amplitude = [pooled(frame[None].double() * sign.to(frame.device), BLOCK).square().mean() for frame in clip]
    return float(torch.stack(amplitude).mean().sqrt()) / LEVEL


def blockiness(clip: Tensor, grid: int = BLOCK) -> float:
    """Mean step of the luma across grid lines over the mean step elsewhere, minus 1; 0 without a visible grid.

    Args:
        clip: ``[frames, 3, height, width]`` in [0, 1].
        grid: pixels between the lines; 8 is the side of a latent cell of most video models.
    """
    frames = luma(clip.float()).double()
    on, off = [], []
    for axis in (-1, -2):
        steps = frames.diff(dim=axis).abs().transpose(axis, -1)
        line = torch.arange(1, steps.shape[-1] + 1) % grid == 0
        on.append(steps[..., line].flatten())
        off.append(steps[..., ~line].flatten())
    line_step, other_step = torch.cat(on), torch.cat(off)
    if not line_step.numel() or not other_step.numel():
        return 0.0
    return float((line_step.mean() + LEVEL / 4) / (other_step.mean() + LEVEL / 4)) - 1  # a quarter level: flat frames give 0


def sharpness(clip: Tensor) -> float:
    """RMS of the luma's step from pixel to pixel in both directions, in levels."""
    energy = [frame.diff(dim=0).square().mean() + frame.diff(dim=1).square().mean() for frame in luma(clip.float()).double()]
    return float(torch.stack(energy).mean().sqrt()) / LEVEL


# --------------------------------------------------------------------------------------------------------------- colour


def lab(clip: Tensor) -> Tensor:
    """CIE L*a*b* (D65) of sRGB values in [0, 1], the same shape; L* in [0, 100]."""
    gamma = clip.clamp(0, 1)
    linear = torch.where(gamma <= 0.04045, gamma / 12.92, ((gamma + 0.055) / 1.055) ** 2.4)
    to_xyz = clip.new_tensor([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
    xyz = torch.einsum("xc,nchw->nxhw", to_xyz / to_xyz.sum(1, keepdim=True), linear)  # white is 1, 1, 1
    bent = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-9) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = bent.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def mean_color(clip: Tensor) -> Tensor:
    """L*, a*, b* ``[3]``: mean over pixels, then median over frames, so that one black frame does not count."""
    return torch.stack([lab(frame[None].double()).mean((0, 2, 3)) for frame in clip]).quantile(0.5, dim=0)


def color_shift(reference: Tensor, test: Tensor) -> float:
    """CIE 1976 Delta E between the mean colours of the two clips; 2.3 is about the smallest difference that people see.

    Raises:
        MeasurementError: if the shapes differ.
    """
    check_pair(reference, test)
    return float((mean_color(test) - mean_color(reference)).norm())


# -------------------------------------------------------------------------------------------------------- broken frames


def black_mask(clip: Tensor) -> Tensor:
    """Frames in which at most 0.1 % of the pixels have a channel of 16 levels or more: bool ``[frames]``.

    A dark scene with a small bright object is not black: the object's pixels count, not the mean.
    """
    return (clip.amax(1) >= BLACK).double().mean((1, 2)) <= SPECKS


def constant_mask(clip: Tensor) -> Tensor:
    """Frames of one colour, bool ``[frames]``: at most 0.1 % of the pixels are over 4 levels from the median."""
    stray = [(frame - frame.flatten(1).median(1).values[:, None, None]).abs().amax(0) > CONSTANT for frame in clip]
    return torch.stack(stray).double().mean((1, 2)) <= SPECKS


def saturated_mask(clip: Tensor) -> Tensor:
    """Frames, bool ``[frames]``, with over 80 % of the pixels at 0 or 1 in every channel (to half a level), not black."""
    clipped = ((clip < LEVEL / 2) | (clip > 1 - LEVEL / 2)).all(1) & (clip.amax(1) >= BLACK)
    return clipped.double().mean((1, 2)) > SATURATED_SHARE


BROKEN: dict[str, FaultMask] = {"black": black_mask, "constant": constant_mask, "saturated": saturated_mask}


def black(clip: Tensor) -> int:
    """Number of black frames; see :func:`black_mask`."""
    return int(black_mask(clip).sum())


def constant(clip: Tensor) -> int:
    """Number of frames of one colour; see :func:`constant_mask`."""
    return int(constant_mask(clip).sum())


def saturated(clip: Tensor) -> int:
    """Number of saturated frames; see :func:`saturated_mask`."""
    return int(saturated_mask(clip).sum())


def newly_broken(reference: Tensor, test: Tensor) -> dict[str, int]:
    """Number of ``black``, ``constant`` and ``saturated`` frames of the test that are not so in the reference.

    Raises:
        MeasurementError: if the shapes differ.
    """
    check_pair(reference, test)
    return {name: int((mask(test) & ~mask(reference)).sum()) for name, mask in BROKEN.items()}
