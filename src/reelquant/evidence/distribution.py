"""Distances of two sets of feature vectors, Fréchet (FVD, FID) and kernel (KID), and the uncertainty of both.

Everything is computed in float64 on the CPU. A Fréchet distance of few samples is far too large (its bias shrinks as 1
/ n), so a value means something only beside another one of the same size: :func:`bias_curve` shows how large the bias
is, :func:`jackknife` how sure a difference is.

Paper:
    Dowson and Landau, The Fréchet distance between multivariate normal distributions, 1982.
    Heusel et al., GANs Trained by a Two Time-Scale Update Rule, 2017, equation 6 (FID).
    Binkowski et al., Demystifying MMD GANs, 2018, section 4 (KID).
    Chong and Forsyth, Effectively Unbiased FID and Inception Score, 2020, section 3 (the bias, and its removal).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reelquant._errors import MeasurementError

Distance = Callable[[Tensor, Tensor], float]

UNUSABLE = "NaN or infinite numbers; look at the clips for frames of them"
ONE_NETWORK = "take both sets from one network"


def _features(features: Tensor, whose: str) -> Tensor:
    if features.ndim != 2:
        raise MeasurementError(
            f"a distance of sets needs features [n, d], the {whose} features are {tuple(features.shape)}; give one row per sample"
        )
    if len(features) < 2:
        raise MeasurementError(f"a spread needs 2 samples at least, the {whose} set has {len(features)}; measure more clips")
    if not features.isfinite().all():
        raise MeasurementError(f"the {whose} features hold {UNUSABLE}")
    return features.detach().cpu().double()


def _pair(reference: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    reference, test = _features(reference, "reference"), _features(test, "test")
    if reference.shape[1] != test.shape[1]:
        raise MeasurementError(
            f"features of different networks: {reference.shape[1]} numbers a sample against {test.shape[1]}; {ONE_NETWORK}"
        )
    return reference, test


@dataclass
class Moments:
    """Count, mean and scatter of feature vectors that come in batches; memory is one d x d matrix, however many come.

    Attributes:
        count: vectors seen.
        mean: ``[d]`` float64.
        scatter: ``[d, d]`` float64, the sum of outer products of the deviations from the mean.
    """

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    scatter: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))

    def update(self, features: Tensor) -> Moments:
        """Takes in ``[n, d]`` more vectors and returns itself.

        The deviations are taken from the batch's own mean first (Chan et al., 1979), so that large means cost no
        digits.

        Raises:
            MeasurementError: if the shape is not [n, d], d differs from that of earlier samples, or a number is not
                finite.
        """
        if features.ndim != 2 or (self.count and features.shape[1] != len(self.mean)):
            raise MeasurementError(
                f"moments of {len(self.mean) or 'd'} numbers a sample cannot take in features {tuple(features.shape)}; {ONE_NETWORK}"
            )
        if not features.isfinite().all():
            raise MeasurementError(f"the features hold {UNUSABLE}")
        if not len(features):
            return self
        features = features.detach().cpu().double()
        if not self.count:
            self.mean = torch.zeros(features.shape[1], dtype=torch.float64)
            self.scatter = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
        n, mean = len(features), features.mean(0)
        away, total = mean - self.mean, self.count + n
        centred = features - mean
        self.scatter = self.scatter + centred.mT @ centred + away.outer(away) * (self.count * n / total)
        self.mean = self.mean + away * (n / total)
        self.count = total
        return self

    @property
    def covariance(self) -> Tensor:
        """``[d, d]``, unbiased (divided by n - 1), as ``np.cov`` gives it.

        Raises:
            MeasurementError: for fewer than 2 vectors.
        """
        if self.count < 2:
            raise MeasurementError(f"a spread needs 2 samples at least, got {self.count}; measure more clips")
        return self.scatter / (self.count - 1)


def frechet_moments(reference: Moments, test: Moments) -> float:
    """:func:`frechet` from means and covariances alone.

    ``tr sqrt(S1 S2)`` is the sum of the roots of the eigenvalues of ``R^T S2 R`` with ``S1 = R R^T``: symmetric, so no
    complex numbers and no matrix root come up. Eigenvalues that rounding made negative count as zero.

    Raises:
        MeasurementError: if either has fewer than 2 vectors, or they are of different lengths.
    """
    if reference.mean.shape != test.mean.shape:
        raise MeasurementError(
            f"features of different networks: {len(reference.mean)} numbers a sample against {len(test.mean)}; {ONE_NETWORK}"
        )
    one, two = reference.covariance, test.covariance
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp(min=0).sqrt()
    shared = torch.linalg.eigvalsh(root.mT @ two @ root).clamp(min=0).sqrt().sum()
    away = (reference.mean - test.mean).square().sum()
    return max(0.0, float(away + one.trace() + two.trace() - 2 * shared))


def frechet(reference: Tensor, test: Tensor) -> float:
    """``|m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2))``: FVD of I3D features, FID of Inception features.

    Covariances are unbiased. With fewer samples than dimensions the covariances have no full rank and a matrix root of
    their product is unsafe; then the trace is taken as the sum of singular values of ``A B^T`` for centred A and B with
    ``S1 = A^T A``, ``S2 = B^T B``, which is the same number, exactly, from a small matrix.

    Args:
        reference: ``[n, d]``.
        test: ``[m, d]``.

    Returns:
        The squared distance, in squared units of the features, at least 0 (rounding below it is cut).

    Raises:
        MeasurementError: for fewer than 2 samples, other shapes, or numbers that are not finite.
    """
    reference, test = _pair(reference, test)
    if min(len(reference), len(test)) >= reference.shape[1]:
        return frechet_moments(Moments().update(reference), Moments().update(test))
    a, b = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (reference, test))
    away = (reference.mean(0) - test.mean(0)).square().sum()
    return max(0.0, float(away + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.mT).sum()))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.mT / a.shape[1] + 1) ** 3


def _mmd(reference: Tensor, test: Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy of two sets of the same size."""
    n = len(reference)
    own = sum((k.sum() - k.diagonal().sum()) / (n * (n - 1)) for k in (_kernel(reference, reference), _kernel(test, test)))
    return float(own - 2 * _kernel(reference, test).mean())


def kernel_distance(
    reference: Tensor,
    test: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """KID: the mean over random subsets of the unbiased squared MMD with the kernel ``(x . y / d + 1)^3``.

    Unlike a Fréchet distance it has no bias at any size, which is why it can be below 0 for sets that do not differ.
    Subsets are drawn without replacement as torch-fidelity draws them, of ``min(subset_size, n, m)`` samples; if that
    is all of both sets, there is only one to draw.

    Args:
        reference: ``[n, d]``.
        test: ``[m, d]``.
        subsets: how many are drawn.
        subset_size: samples in each.
        seed: of the drawing.

    Returns:
        Mean and standard deviation over the subsets, in cubed units of the features; the latter is not a standard
        error, and is 0 for one subset.

    Raises:
        MeasurementError: for fewer than 2 samples, other shapes, numbers that are not finite, or no subsets.
    """
    reference, test = _pair(reference, test)
    size = min(subset_size, len(reference), len(test))
    if subsets < 1 or size < 2:
        raise MeasurementError(f"{subsets} subsets of {subset_size} samples: give at least one subset of at least 2")
    if size == len(reference) == len(test):
        return _mmd(reference, test), 0.0
    generator = torch.Generator().manual_seed(seed)
    draws = [[torch.randperm(len(x), generator=generator)[:size] for x in (reference, test)] for _ in range(subsets)]
    values = torch.tensor([_mmd(reference[i], test[j]) for i, j in draws], dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def jackknife(
    reference: Sequence[Tensor],
    test: Sequence[Tensor],
    distance: Distance,
    groups: int = 20,
    level: float = 0.95,
    *,
    together: bool = True,
) -> tuple[float, float, float]:
    """A distance of two sets of clips with an interval: clips are left out a group at a time.

    The spread of these distances gives the standard error; Student's t with ``groups - 1`` degrees of freedom gives the
    interval. It is the interval of the distance at this number of clips, bias included: the distance of infinitely many
    clips may lie outside. The bootstrap, which intervals of means use, does not work here. It repeats clips and drops a
    third of them, so covariances lose rank and spread, and distances are biased upwards.

    Args:
        reference: per clip ``[rows, d]``; a clip has one row for FVD, one per frame for FID.
        test: per clip ``[rows, d]``.
        distance: e.g. :func:`frechet`.
        groups: at most; fewer if there are fewer clips.
        level: coverage of the interval.
        together: clips of the same index belong together (same prompt, same noise) and leave both sets at once; else
            the sets take turns.

    Returns:
        The distance of the whole sets, and the ends of its interval (which may lie below 0). With fewer than 4 clips
        all three are equal.

    Raises:
        MeasurementError: if clips belong together and the sets differ in size.
    """
    if together and len(reference) != len(test):
        raise MeasurementError(
            f"clips are left out in pairs, but there are {len(reference)} reference and {len(test)} test clips; pass together=False"
        )
    value = distance(torch.cat(list(reference)), torch.cat(list(test)))
    if min(len(reference), len(test)) < 4:
        return value, value, value
    variance, freedom = _spread(reference, test, distance, groups, ("both",) if together else ("reference", "test"))
    reach = _student(freedom, level) * math.sqrt(variance)
    return value, value - reach, value + reach


def _student(freedom: int, level: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + level) / 2))


def _spread(
    reference: Sequence[Tensor],
    test: Sequence[Tensor],
    distance: Distance,
    groups: int,
    sides: Sequence[str],
) -> tuple[float, int]:
    """Variance of the distance and its degrees of freedom, added over the sets that clips leave."""
    variance, freedom = 0.0, 0
    for side in sides:
        count = min(groups, len(reference) if side != "test" else len(test))
        without = torch.tensor([_without(reference, test, distance, side, g, count) for g in range(count)], dtype=torch.float64)
        variance += (count - 1) / count * float((without - without.mean()).square().sum())
        freedom += count - 1
    return variance, freedom


def _without(
    reference: Sequence[Tensor],
    test: Sequence[Tensor],
    distance: Distance,
    side: str,
    group: int,
    groups: int,
) -> float:
    """The distance after every ``groups``-th clip has left one set or both."""

    def rest(clips: Sequence[Tensor], name: str) -> Tensor:
        return torch.cat([clip for i, clip in enumerate(clips) if i % groups != group or side not in (name, "both")])

    return distance(rest(reference, "reference"), rest(test, "test"))


def bias_curve(
    reference: Tensor,
    test: Tensor,
    sizes: Sequence[int],
    repeats: int = 10,
    seed: int = 0,
    distance: Distance = frechet,
) -> list[tuple[int, float, float]]:
    """The distance of random subsets of both sets, for several sizes: it shows how much of a distance is bias.

    Subsets are drawn without replacement; sets of one size keep their pairs together.

    Args:
        reference: ``[n, d]``.
        test: ``[m, d]``.
        sizes: samples taken of each set, 2 to ``min(n, m)``.
        repeats: subsets for each size.
        seed: of the drawing.
        distance: what is measured.

    Returns:
        For every size: the size, and the mean and standard deviation over the repeats.

    Raises:
        MeasurementError: for a size that cannot be drawn.
    """
    most = min(len(reference), len(test))
    for size in sizes:
        if not 2 <= size <= most:
            raise MeasurementError(
                f"subsets of {size} samples cannot be drawn from {len(reference)} and {len(test)}; give sizes of 2 to {most}"
            )
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> float:
        first = torch.randperm(len(reference), generator=generator)[:size]
        second = first if len(reference) == len(test) else torch.randperm(len(test), generator=generator)[:size]
        return distance(reference[first], test[second])

    curve = []
    for size in sizes:
        values = torch.tensor([draw(size) for _ in range(repeats)], dtype=torch.float64)
        curve.append((size, float(values.mean()), float(values.std(correction=0))))
    return curve


def extrapolated(curve: Sequence[tuple[int, float, float]]) -> float:
    """The distance of infinitely many samples: the least-squares line in 1 / size through a :func:`bias_curve`, at 0.

    Theirs keeps the reference set whole and draws only the test set; here both shrink, whose biases add up and are of
    first order in 1 / size too. The line holds where samples outnumber dimensions; below that the curve still bends,
    and what comes out is too high.

    Raises:
        MeasurementError: for fewer than 2 different sizes.
    """
    inverse = torch.tensor([1 / size for size, _, _ in curve], dtype=torch.float64)
    values = torch.tensor([mean for _, mean, _ in curve], dtype=torch.float64)
    if len(inverse.unique()) < 2:
        raise MeasurementError(f"a line needs at least 2 different sizes; got {[size for size, _, _ in curve]}")
    away = inverse - inverse.mean()
    slope = (away * values).sum() / away.square().sum()
    return float(values.mean() - slope * inverse.mean())
