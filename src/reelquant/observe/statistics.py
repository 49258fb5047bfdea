"""What is remembered of a layer's input during sampling. One class per statistic; a method never owns a calibration loop.

A convolution's input is seen the way its product sees it: with its zero padding, and for sums over taps as patches
``[rows, channels * taps]``. A linear layer is the case of one tap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelquant._errors import CalibrationError
from reelquant.clock import ANY, BOTH, FIRST, SECOND
from reelquant.kernels import hadamard

Need = Literal["range", "rotated", "rows", "gram", "features"]
HALVES = "first", "second"  # of a guidance pair


@dataclass(frozen=True)
class Geometry:
    """How a layer reads its input: enough to cut the patches of a convolution.

    Attributes:
        channels: input channels.
        kernel, stride, padding, dilation: one entry per spatial axis; all empty for a linear layer.
    """

    channels: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> Geometry:
        """Geometry of a linear or convolution layer."""
        if isinstance(module, nn.Linear):
            return cls(module.in_features)
        conv: Any = module
        widths = (
            conv._reversed_padding_repeated_twice if isinstance(conv.padding, str) else [w for w in reversed(conv.padding) for _ in (0, 1)]
        )
        return cls(conv.in_channels, conv.kernel_size, conv.stride, tuple(widths), conv.dilation)

    @property
    def taps(self) -> int:
        """Products of kernel sizes; 1 for a linear layer."""
        count = 1
        for size in self.kernel:
            count *= size
        return count

    @property
    def padded(self) -> bool:
        """True if zeros are read beyond the border."""
        return any(self.padding)

    def rows(self, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """``[min(count, positions), channels * taps]``: patches at random positions, float32."""
        if not self.kernel:
            flat = x.reshape(-1, x.shape[-1])
            return flat[_pick(len(flat), count, generator).to(x.device)].float()
        x = F.pad(x, self.padding) if self.padded else x
        outputs = [
            (size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(x.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
        ]
        sizes = [x.shape[0], *outputs]
        index = torch.unravel_index(_pick(_product(sizes), count, generator).to(x.device), sizes)
        return self._patches(x, list(index)).float()

    def _patches(self, x: Tensor, index: list[Tensor]) -> Tensor:
        """Gather ``[rows, channels, *kernel]`` at output positions and flatten."""
        axes: list[Tensor] = []
        dims = len(self.kernel)
        for axis, (start, k, s, d) in enumerate(zip(index[1:], self.kernel, self.stride, self.dilation, strict=True)):
            shape = [1] * dims
            shape[axis] = k
            taps = (torch.arange(k, device=x.device) * d).view(1, *shape)
            axes.append(start.view(-1, *[1] * dims) * s + taps)
        batch = index[0].view(-1, *[1] * dims)
        patches = x.movedim(1, -1)[(batch, *axes)]  # [rows, *kernel, channels]
        return patches.movedim(-1, 1).reshape(len(patches), -1)


def _product(sizes: list[int]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count


def _pick(total: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.arange(total) if total <= count else torch.randint(total, (count,), generator=generator)


class Statistic(ABC):
    """Sees every input of a layer, with the step and the sampling run (part) it belongs to.

    Seeing has two halves, so that what one call showed can be kept on disk in between: :meth:`look` says what is worth knowing of one
    input, :meth:`absorb` adds that to what is known. Equal looks absorbed in equal order give equal bits.
    """

    @abstractmethod
    def look(self, x: Tensor) -> dict[str, Tensor]:
        """What there is to know of one input; what is known so far is not touched."""

    @abstractmethod
    def absorb(self, seen: Mapping[str, Tensor], step: int, part: int = 0) -> None:
        """Add one look."""

    def update(self, x: Tensor, step: int, part: int = 0) -> None:
        """Look and absorb."""
        self.absorb(self.look(x), step, part)


@dataclass
class ChannelRange(Statistic):
    """Smallest, largest and mean value of every input channel at every step of every sampling run.

    A *part* is one run of the sampler. Parts are independent samples of what the model may see later, which :meth:`envelope` uses.
    ``frames`` is 1 unless frames have scales of their own, in which case the leading axis of the input is ``batch * frames``.
    """

    channel_axis: int
    padded: bool
    frames: int = 1
    _low: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (step, part) -> [frames, channels]
    _high: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _sum: dict[int, Tensor] = field(default_factory=dict)
    _count: dict[int, int] = field(default_factory=dict)

    def look(self, x: Tensor) -> dict[str, Tensor]:
        if x.shape[0] % self.frames:
            raise CalibrationError(f"frame-{self.frames} needs inputs with a leading axis of batch * {self.frames}, got {tuple(x.shape)}")
        rows = x.detach().movedim(self.channel_axis, -1).float()
        rows = rows.reshape(-1, self.frames, rows[0].numel() // rows.shape[-1], rows.shape[-1]).transpose(0, 1).flatten(1, 2)
        low, high = rows.amin(1), rows.amax(1)
        if self.padded:
            low, high = low.clamp(max=0), high.clamp(min=0)
        return {"low": low, "high": high, "sum": rows.sum(1), "count": torch.tensor(rows.shape[1])}

    def absorb(self, seen: Mapping[str, Tensor], step: int, part: int = 0) -> None:
        low, high, key = seen["low"], seen["high"], (step, part)
        self._low[key] = torch.minimum(self._low[key], low) if key in self._low else low
        self._high[key] = torch.maximum(self._high[key], high) if key in self._high else high
        self._sum[step] = self._sum.get(step, 0) + seen["sum"]
        self._count[step] = self._count.get(step, 0) + int(seen["count"])

    @property
    def seen(self) -> list[int]:
        """The steps at which the layer ran."""
        return sorted(self._sum)

    @property
    def mean(self) -> Tensor:
        """``[steps, frames, channels]``."""
        return torch.stack([self._sum[step] / self._count[step] for step in sorted(self._sum)])

    def envelope(self, *, per_step: bool = False, unseen: bool = False) -> tuple[Tensor, Tensor]:
        """Range of every channel, ``(low, high)``, each ``[slots, frames, channels]``; one slot unless ``per_step``.

        Args:
            unseen: extend what was seen to what later clips may reach, by the jackknife estimate of an endpoint: with the two largest
                values ``a >= b`` over parts, ``2 a - b``. Steady channels keep their range, erratic ones get headroom.

        Paper: Robson and Whitlock, "Estimation of a truncation point", Biometrika 51 (1964).
        """
        return -self._extreme({key: -low for key, low in self._low.items()}, per_step, unseen), self._extreme(self._high, per_step, unseen)

    def _extreme(self, values: dict[tuple[int, int], Tensor], per_step: bool, unseen: bool) -> Tensor:
        by_slot: dict[int, dict[int, list[Tensor]]] = {}
        for (step, part), value in sorted(values.items()):
            by_slot.setdefault(step if per_step else 0, {}).setdefault(part, []).append(value)
        slots = [torch.stack([torch.stack(parts[part]).amax(0) for part in parts]) for parts in by_slot.values()]
        return torch.stack([_endpoint(parts) if unseen and len(parts) > 1 else parts.amax(0) for parts in slots])


def _endpoint(maxima: Tensor) -> Tensor:
    """Jackknife estimate of the largest possible value from maxima of independent parts, ``[parts, ...]``."""
    first, second = maxima.topk(2, dim=0).values
    return 2 * first - second


@dataclass
class Rows(Statistic):
    """A sample of patches, about ``total`` in all, evenly from all calls: ``[rows, channels * taps]`` float32."""

    geometry: Geometry
    per_call: int
    generator: torch.Generator
    _parts: list[Tensor] = field(default_factory=list)
    _steps: list[Tensor] = field(default_factory=list)

    def look(self, x: Tensor) -> dict[str, Tensor]:
        return {"rows": self.geometry.rows(x.detach(), self.per_call, self.generator).cpu()}

    def absorb(self, seen: Mapping[str, Tensor], step: int, part: int = 0) -> None:
        self._parts.append(seen["rows"])
        self._steps.append(torch.full((len(self._parts[-1]),), step))

    @property
    def steps(self) -> Tensor:
        """The step that each row was seen at."""
        return torch.cat(self._steps)

    @property
    def rows(self) -> Tensor:
        return torch.cat(self._parts)


@dataclass
class Gram(Statistic):
    """Mean and second moment of patches: what column solvers and bias correction need."""

    geometry: Geometry
    per_call: int
    generator: torch.Generator
    count: int = 0
    _origin: Tensor | None = None  # moments are taken around it: a large mean would eat the precision of the covariance
    _sum: Tensor | float = 0.0
    _square: Tensor | float = 0.0
    _factors: dict[tuple[float, tuple[int, ...]], Tensor] = field(default_factory=dict)

    def look(self, x: Tensor) -> dict[str, Tensor]:
        return {"rows": self.geometry.rows(x.detach(), self.per_call, self.generator)}

    def absorb(self, seen: Mapping[str, Tensor], step: int, part: int = 0) -> None:
        rows = seen["rows"]
        self._origin = rows.mean(0) if self._origin is None else self._origin
        rows = rows - self._origin
        self._sum = self._sum + rows.sum(0)
        product = rows.T @ rows
        self._square = self._square.add_(product) if isinstance(self._square, Tensor) else product
        self.count += len(rows)

    @property
    def state(self) -> dict[str, Tensor]:
        """Everything that was absorbed."""
        assert self._origin is not None and isinstance(self._sum, Tensor) and isinstance(self._square, Tensor)
        return {"origin": self._origin, "sum": self._sum, "square": self._square, "count": torch.tensor(self.count)}

    @state.setter
    def state(self, known: Mapping[str, Tensor]) -> None:
        self._origin, self._sum, self._square, self.count = known["origin"], known["sum"], known["square"], int(known["count"])

    @property
    def mean(self) -> Tensor:
        """``[channels * taps]``."""
        assert self._origin is not None
        return self._origin + self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """``[channels * taps, channels * taps]``, centred: a bias absorbs what the mean contributes."""
        assert isinstance(self._sum, Tensor)
        mean = self._sum / self.count
        return self._square / self.count - torch.outer(mean, mean)

    @cached_property
    def rotated(self) -> Gram:
        """The same moments of the input after :func:`reelquant.kernels.hadamard` along its channels."""
        assert isinstance(self._sum, Tensor) and isinstance(self._square, Tensor) and self._origin is not None

        def rotate(x: Tensor) -> Tensor:
            return hadamard(x.unflatten(-1, (-1, self.geometry.taps)), -2).flatten(-2)

        square = rotate(rotate(self._square).T)
        return Gram(self.geometry, self.per_call, self.generator, self.count, rotate(self._origin), rotate(self._sum), square)

    def inverse_factor(self, damping: float, order: Tensor) -> Tensor:
        """:func:`inverse_factor` of the covariance; the last one is kept, because layers that share an input ask for the same."""
        key = (damping, tuple(order.tolist()))
        if key not in self._factors:
            self._factors = {key: inverse_factor(self.covariance, damping, order)}
        return self._factors[key]


def inverse_factor(covariance: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """Upper Cholesky factor ``U``, ``[in, in]`` float32, of a damped inverse covariance: ``U^T U = (C + damping * diag(C))^-1``.

    Rows and columns of ``C`` are taken in ``order`` first.

    Damping is relative to each channel's own variance, so the factor of ``C / (s s^T)`` is ``U * s``: one factorization serves every
    rescaling of the channels. Channels that never move count as average ones. Damping grows tenfold until the factorization succeeds.

    Raises:
        CalibrationError: if the covariance is not finite (inputs beyond 1e19 overflow their squares).
    """
    matrix = (covariance if order is None else covariance[order][:, order]).double()
    if not bool(matrix.isfinite().all()):
        raise CalibrationError("the second moment of a layer's input overflowed; inputs this large cannot be calibrated")
    diagonal = matrix.diagonal()
    diagonal = torch.where(diagonal > 1e-12 * diagonal.amax(), diagonal, diagonal.mean().clamp(min=1e-12))
    matrix = matrix - torch.diag(matrix.diagonal() - diagonal)
    factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag(diagonal * damping))
    while bool(failed):  # few samples leave eigenvalues that rounding turns negative
        damping *= 10
        factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag(diagonal * damping))
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).float()


@dataclass
class Features(Statistic):
    """The input of a temporal layer at every step: ``[steps, channels]``; rows of one call must agree."""

    _by_step: dict[int, Tensor] = field(default_factory=dict)
    varies: bool = False  # rows differ inside a call or between calls of one step: other conditioning is mixed in

    def look(self, x: Tensor) -> dict[str, Tensor]:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        return {"first": flat[0].clone(), "low": flat.amin(0), "high": flat.amax(0)}

    def absorb(self, seen: Mapping[str, Tensor], step: int, part: int = 0) -> None:
        known = self._by_step.setdefault(step, seen["first"])
        self.varies |= not all(torch.allclose(seen[end], known, rtol=1e-4, atol=1e-5) for end in ("low", "high"))

    @property
    def features(self) -> Tensor:
        return torch.stack([self._by_step[step] for step in sorted(self._by_step)])


@dataclass
class InputStatistics:
    """All statistics of one input tensor, as one sampling pass left them. A member nobody asked for is None.

    Raises:
        CalibrationError: by :meth:`check`, if anything that was seen is NaN or infinite.
    """

    name: str
    geometry: Geometry
    range: ChannelRange
    rows: Rows | None = None
    gram: Gram | None = None
    features: Features | None = None
    rotated: ChannelRange | None = None  # of the rotated channels
    halves: tuple[InputStatistics, InputStatistics] | None = None  # ranges of each half of a guidance pair

    @property
    def parts(self) -> dict[str, Statistic]:
        """The statistics that somebody asked for, by their member's name."""
        named = {name: getattr(self, name) for name in ("rotated", "range", "rows", "gram", "features")}
        return {name: statistic for name, statistic in named.items() if statistic is not None}

    def look(self, x: Tensor, half: int = ANY) -> dict[str, Tensor]:
        """What all members have to know of one input: ``range.low``, ``rows.rows``, ``first.range.low`` (of a half of guidance) ..."""
        found: dict[str, Tensor] = {}
        for name, statistic in self.parts.items():
            seen = hadamard(x.detach().float(), statistic.channel_axis) if statistic is self.rotated else x
            found |= {f"{name}.{key}": value for key, value in statistic.look(seen).items()}
        for name, (statistics, rows) in self._halves_in(x, half).items():
            found |= {f"{name}.{key}": value for key, value in statistics.look(rows).items()}
        return found

    def _halves_in(self, x: Tensor, half: int) -> dict[str, tuple[InputStatistics, Tensor]]:
        """The rows of each half of a guidance pair that a call computed."""
        if self.halves is None:
            return {}
        if half == BOTH and len(x) % 2 == 0:
            return dict(zip(HALVES, zip(self.halves, x.chunk(2), strict=True), strict=True))
        return {HALVES[half - FIRST]: (self.halves[half - FIRST], x)} if half in (FIRST, SECOND) else {}

    def absorb(self, seen: Mapping[str, Tensor], step: int, part: int = 0) -> None:
        """Add one look to all members."""
        halves = {} if self.halves is None else dict(zip(HALVES, self.halves, strict=True))
        for name, statistic in (self.parts | halves).items():
            own = {key.partition(".")[2]: value for key, value in seen.items() if key.startswith(f"{name}.")}
            if own:
                statistic.absorb(own, step, part)

    def update(self, x: Tensor, step: int, part: int = 0, half: int = ANY) -> None:
        """Look and absorb."""
        self.absorb(self.look(x, half), step, part)

    @property
    def apart(self) -> bool:
        """Whether each half of a guidance pair was seen at every step."""
        return self.halves is not None and all(half.range.seen == self.range.seen for half in self.halves)

    def bad_from(self) -> float:
        """The first step at which a value was NaN or infinite; infinity if none was."""
        if not self.range.seen:
            return float("inf")
        low, high = self.range.envelope(per_step=True)
        broken = ~(low.isfinite() & high.isfinite()).flatten(1).all(1)
        return min((step for step, bad in zip(self.range.seen, broken.tolist(), strict=True) if bad), default=float("inf"))

    def check(self, timesteps: list[float]) -> None:
        """Refuse statistics that are missing or not finite, naming layer and step."""
        if not self.range.seen:
            raise CalibrationError(f"layer '{self.name}' never ran while sampling, so nothing is known of its input; skip it")
        step = self.bad_from()
        if step < len(timesteps):
            raise CalibrationError(
                f"the input of layer '{self.name}' holds NaN or inf at step {step:g} (timestep {timesteps[int(step)]:g}); "
                "check the weights, or run the pipeline in float32 or bfloat16 instead of float16"
            )
