"""Choose a weight format for every layer with an integer program, from the damage that each format was measured to do."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from torch import Tensor
from torch.utils._pytree import tree_leaves

from reelquant._errors import CalibrationError, RecipeError
from reelquant.formats import parse_format, parse_granularity
from reelquant.formats.criteria import nmse
from reelquant.observe import RecordedCall
from reelquant.stages import ModelWork, Specs, Stage, StageSite

GRAINS = ("tensor", "channel", "group")
Options = Mapping[str, Sequence[Specs]]


@dataclass(frozen=True)
class Milp(Stage):
    """Give every layer one of several weight formats: those with the least total damage that fit into a budget of bits.

    The damage of a format in a layer is measured. The layer is quantized with it, rounded to nearest, its input as the recipe says,
    and all other layers are float. The damage is the squared error of the denoiser's output over its variance, mean over recorded
    calls. The program then minimises the sum of the damages of all layers, one format per layer (the errors of different layers are
    taken to be independent). HiGHS solves it to the optimum.

    Attributes:
        formats: what a layer may get, each ``FORMAT/GRANULARITY``. The range rule is that of the layer's own weight.
        bits: most stored bits per weight, mean over the layers of the step; codes and scales count, biases do not.
        calls: recorded calls of the denoiser to measure on, spread over the trajectory. Measuring calls the denoiser
            ``(layers * formats + 1) * calls`` times.

    Paper: MixDQ (arXiv 2405.17873), the integer program of section 3.4. Deviations: one sensitivity for all layers (the error of the
    denoiser's output) where the paper has one for content and one for quality, each with a program of its own, and scans how they
    share the budget; scales count as bits; inputs keep the format of the recipe.
    """

    formats: tuple[str, ...] = ("int4/group-64", "int6/channel", "int8/channel")
    bits: float = 4.5
    calls: int = 4
    exclusive: ClassVar[bool] = True
    default_on: ClassVar[str] = "*"
    in_memory: ClassVar[str | None] = (
        "'allocate: milp' calls the whole denoiser for every layer and format; write the formats as rules instead"
    )

    def __post_init__(self) -> None:
        if len(set(self.formats)) < 2 or len(set(self.formats)) != len(self.formats):
            raise RecipeError(f"milp.formats takes two or more different formats to choose from, got {list(self.formats)}")
        for written in self.formats:
            _parsed(written)
        if self.bits <= 0:
            raise RecipeError(f"milp.bits is a positive number of bits per weight, got {self.bits}")
        if self.calls < 1:
            raise RecipeError(f"milp.calls is at least 1, got {self.calls}")

    @property
    def records(self) -> int:
        return self.calls

    def own_calls(self, layers: int) -> int:
        return (layers * len(self.formats) + 1) * self.calls

    def supports(self, site: StageSite) -> str | None:
        own = site.specs.weight
        if own.alternatives:
            return f"milp chooses among its own formats, and the recipe leaves a choice for this weight ({own}); name one format"
        return next((problem for one in self.options(site.specs) for problem in _problems(site, one)), None)

    def options(self, specs: Specs) -> list[Specs]:
        """The numbers of a layer with each of :attr:`formats`."""
        return [specs._replace(weight=replace(specs.weight, **_parsed(written))) for written in self.formats]

    def choose_specs(self, work: ModelWork) -> Mapping[str, Specs]:
        options = {name: self.options(work.specs[name]) for name in work.touched(self)}
        sizes = np.array([[_stored_bytes(work, name, one) for one in row] for name, row in options.items()])
        budget = self._budget(work, options, sizes)
        damage = self._measured(work, options)
        picked = solve(damage, sizes, budget)
        spent = sizes[range(len(sizes)), picked].sum()
        if spent < 0.99 * budget:
            work.warnings.append(
                f"milp uses {self.bits * spent / budget:.2f} of {self.bits} bits per weight: no better choice of formats fits into the rest"
            )
        return {name: row[pick] for (name, row), pick in zip(options.items(), picked, strict=True)}

    def _budget(self, work: ModelWork, options: Options, sizes: np.ndarray) -> float:
        """Bytes that the layers may take.

        Raises:
            RecipeError: if :attr:`bits` is less than the smallest formats take, or more than the largest do.
        """
        if not options:
            raise RecipeError(f"milp has no quantized layer of '{work.component}' to choose for; widen its 'on'")
        weights = sum(math.prod(work.map.layers[name].shape) for name in options)
        least, most = 8 * sizes.min(1).sum() / weights, 8 * sizes.max(1).sum() / weights
        if not least <= self.bits <= most:
            raise RecipeError(
                f"milp.bits is {self.bits}, and {', '.join(self.formats)} take {least:.3f} to {most:.3f} bits per weight with their scales "
                f"on the {len(options)} layers of '{work.component}'; choose bits in between, or other formats"
            )
        return self.bits * weights / 8

    def _measured(self, work: ModelWork, options: Options) -> np.ndarray:
        """Damage of every format in every layer, ``[layers, formats]``."""
        with torch.no_grad():  # outputs are computed again: what was recorded may hold results that a reuse kept
            calls = [replace(call, output=work.output(call)) for call in _spread(work.calls, self.calls)]
        with work.timed("measure formats", len(options) * len(self.formats)):
            return np.array([[_damage(work, name, one, calls) for one in row] for name, row in options.items()])


def solve(damage: np.ndarray, sizes: np.ndarray, budget: float) -> list[int]:
    """The format of every layer: the least total damage whose total size is at most ``budget``.

    Args:
        damage, sizes: ``[layers, formats]``.
        budget: in the unit of ``sizes``; at least the sum of the smallest sizes.
    """
    layers, formats = damage.shape
    one_each = LinearConstraint(np.kron(np.eye(layers), np.ones(formats)), 1, 1)
    within = LinearConstraint(sizes.reshape(1, -1) / budget, ub=1)
    # HiGHS stops at an absolute gap of 1e-6 as well: damages are scaled so that this is far below what can be measured.
    scaled = damage.ravel() * (1000 / (damage.max() or 1.0))
    bounds, options = Bounds(0, 1), {"mip_rel_gap": 0.0}
    with _unheard():
        found: OptimizeResult = milp(scaled, integrality=1, bounds=bounds, constraints=[one_each, within], options=options)
    if found.x is None:
        raise RecipeError(f"milp found no choice of formats within {budget:.0f}: {found.message}")
    return found.x.reshape(layers, formats).argmax(1).tolist()


@contextmanager
def _unheard() -> Iterator[None]:
    """Inside, the file behind the standard output is another one: HiGHS prints notes for its own developers, whatever its options say."""
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else lambda stream: None  # what C has printed waits in a buffer of its own
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    flush(None)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            flush(None)
            os.dup2(kept, 1)
            os.close(kept)


def _spread(calls: Sequence[RecordedCall], wanted: int) -> list[RecordedCall]:
    """So many of the calls, at steps as different as possible; all calls if there are no more."""
    ordered = sorted(range(len(calls)), key=lambda number: calls[number].step)
    count = min(wanted, len(ordered))
    return [calls[ordered[(2 * pick + 1) * len(ordered) // (2 * count)]] for pick in range(count)]


@torch.no_grad()
def _damage(work: ModelWork, name: str, specs: Specs, calls: Sequence[RecordedCall]) -> float:
    """What a layer with these numbers alone does to the outputs of calls: squared error over variance, mean over calls."""
    with work.drafted({name: specs}):
        errors = [nmse(_flat(call.output), _flat(work.output(call))) for call in calls]
    work.advance()
    damage = float(torch.stack(errors).double().mean())
    if not math.isfinite(damage):
        raise CalibrationError(
            f"'{work.component}' gives NaN or inf with {specs.weight} weights in layer '{name}'; "
            "take that format out of milp.formats, or leave the layer out with 'on'"
        )
    return damage


def _flat(output: Any) -> Tensor:
    """All tensors of an output, one after the other: ``[values]`` float32."""
    return torch.cat([leaf.float().flatten() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])


def _stored_bytes(work: ModelWork, name: str, specs: Specs) -> int:
    """Bytes of the codes and scales of a weight; the bias stays float32 whatever the format is."""
    bias = getattr(work.float_layer(name), "bias", None)
    return work.layer_bytes(name, specs) - (4 * bias.numel() if isinstance(bias, Tensor) else 0)


def _problems(site: StageSite, specs: Specs) -> list[str]:
    """Why stages earlier in the recipe cannot work with these numbers."""
    answers = [stage.supports(replace(site, specs=specs, before=site.before[:number])) for number, stage in enumerate(site.before)]
    return [f"with {specs.weight} weights, as milp may choose: {answer}" for answer in answers if answer]


def _parsed(written: str) -> dict[str, Any]:
    """What ``int4/group-64`` changes in a :class:`QuantSpec`."""
    fmt, slash, grain = str(written).partition("/")
    if not slash:
        raise RecipeError(f"milp.formats are written FORMAT/GRANULARITY, as in int4/group-64; got {written!r}")
    granularity = parse_granularity(grain)
    if granularity.kind not in GRAINS:
        raise RecipeError(f"a weight has no {granularity.kind}s; milp.formats take {', '.join(GRAINS[:-1])} or group-n, got {written!r}")
    return {"format": parse_format(fmt), "granularity": granularity}
