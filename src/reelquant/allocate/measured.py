"""Stages that measure what formats do to the layers of a model and then divide a budget of bits: what all of them share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from reelquant._errors import CalibrationError, RecipeError
from reelquant.allocate.problem import Picks, Problem
from reelquant.allocate.sizes import check_weight
from reelquant.formats.criteria import nmse
from reelquant.observe import RecordedCall
from reelquant.stages import ModelWork, Specs, Stage, StageSite

IN_MEMORY = "'allocate: {}' calls the whole denoiser for every layer and format; write the formats as rules instead"
Options = Mapping[str, Sequence[Specs]]


@dataclass(frozen=True)
class Measured(Stage):
    """Give every layer one of several weight formats, from the damage that each was measured to do.

    The layer is quantized with the format, rounded to nearest, its input as the recipe says, and all other layers are float. The damage is
    the squared error of the denoiser's output over its variance, mean over recorded calls. A member says in :meth:`pick` how the budget is
    divided then.

    Attributes:
        formats: what a layer may get, each ``FORMAT/GRANULARITY``. The range rule is that of the layer's own weight.
        bits: most stored bits per weight, mean over the layers of the step; codes and scales count, biases do not.
        calls: recorded calls of the denoiser to measure on, spread over the trajectory. Measuring calls the denoiser
            ``(layers * formats + 1 + trials) * calls`` times.
        word: what recipes call the member.
    """

    formats: tuple[str, ...] = ("int4/group-64", "int6/channel", "int8/channel")
    bits: float = 4.5
    calls: int = 4
    exclusive: ClassVar[bool] = True
    default_on: ClassVar[str] = "*"
    word: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if len(set(self.formats)) < 2 or len(set(self.formats)) != len(self.formats):
            raise RecipeError(f"{self.word}.formats takes two or more different formats to choose from, got {list(self.formats)}")
        for written in self.formats:
            check_weight(written, f"{self.word}.formats")
        if self.bits <= 0:
            raise RecipeError(f"{self.word}.bits is a positive number of bits per weight, got {self.bits}")
        if self.calls < 1:
            raise RecipeError(f"{self.word}.calls is at least 1, got {self.calls}")

    @property
    def trials(self) -> int:
        """How many whole allocations the member tries out, at most."""
        return 0

    @property
    def records(self) -> int:
        return self.calls

    def own_calls(self, layers: int) -> int:
        return (layers * len(self.formats) + 1 + self.trials) * self.calls

    def pick(self, problem: Problem) -> Picks:
        """Divide the budget."""
        raise NotImplementedError

    def supports(self, site: StageSite) -> str | None:
        own = site.specs.weight
        if own.alternatives:
            return f"{self.word} chooses among its own formats, and the recipe leaves a choice for this weight ({own}); name one format"
        return next((problem for one in self.options(site.specs) for problem in _problems(self.word, site, one)), None)

    def options(self, specs: Specs) -> list[Specs]:
        """The numbers of a layer with each of :attr:`formats`."""
        return [
            specs._replace(weight=replace(specs.weight, **check_weight(written, f"{self.word}.formats")._asdict()))
            for written in self.formats
        ]

    def choose_specs(self, work: ModelWork) -> Mapping[str, Specs]:
        options = {name: self.options(work.specs[name]) for name in work.touched(self)}
        sizes = np.array([[_stored_bytes(work, name, one) for one in row] for name, row in options.items()])
        budget = self._budget(work, options, sizes)
        picked = self._picked(work, options, sizes, budget)
        spent = sizes[range(len(sizes)), picked].sum()
        if spent < 0.99 * budget:
            work.warnings.append(
                f"{self.word} uses {self.bits * spent / budget:.2f} of {self.bits} bits per weight: "
                "no better choice of formats fits into the rest"
            )
        return {name: row[pick] for (name, row), pick in zip(options.items(), picked, strict=True)}

    def _budget(self, work: ModelWork, options: Options, sizes: np.ndarray) -> float:
        """Bytes that the layers may take.

        Raises:
            RecipeError: if :attr:`bits` is less than the smallest formats take, or more than the largest do.
        """
        if not options:
            raise RecipeError(f"{self.word} has no quantized layer of '{work.component}' to choose for; widen its 'on'")
        weights = sum(math.prod(work.map.layers[name].shape) for name in options)
        least, most = 8 * sizes.min(1).sum() / weights, 8 * sizes.max(1).sum() / weights
        if not least <= self.bits <= most:
            raise RecipeError(
                f"{self.word}.bits is {self.bits}, and {', '.join(self.formats)} take {least:.3f} to {most:.3f} bits per weight "
                f"with their scales on the {len(options)} layers of '{work.component}'; choose bits in between, or other formats"
            )
        return self.bits * weights / 8

    def _picked(self, work: ModelWork, options: Options, sizes: np.ndarray, budget: float) -> Picks:
        """Measure the damage of every format in every layer, and divide the budget."""
        with torch.no_grad():  # outputs are computed again: what was recorded may hold results that a reuse kept
            calls = [replace(call, output=work.output(call)) for call in _spread(work.calls, self.calls)]
        with work.timed("measure formats", len(options) * len(self.formats)):
            damage = np.array([[_damage(self.word, work, {name: one}, calls) for one in row] for name, row in options.items()])
        if not self.trials:
            return self.pick(Problem(damage, sizes, budget))

        left = self.trials

        def trial(picks: Sequence[int]) -> float:
            nonlocal left
            left -= 1
            return _damage(self.word, work, {name: row[pick] for (name, row), pick in zip(options.items(), picks, strict=True)}, calls)

        with work.timed("try allocations", self.trials):
            picked = self.pick(Problem(damage, sizes, budget, trial))
            for _ in range(left):  # those that were not needed
                work.advance()
        return picked


def _spread(calls: Sequence[RecordedCall], wanted: int) -> list[RecordedCall]:
    """So many of the calls, at steps as different as possible; all calls if there are no more."""
    ordered = sorted(range(len(calls)), key=lambda number: calls[number].step)
    count = min(wanted, len(ordered))
    return [calls[ordered[(2 * pick + 1) * len(ordered) // (2 * count)]] for pick in range(count)]


@torch.no_grad()
def _damage(word: str, work: ModelWork, specs: Mapping[str, Specs], calls: Sequence[RecordedCall]) -> float:
    """What these layers with these numbers do to the outputs of calls, all others in float: error over variance, mean over calls."""
    with work.drafted(specs):
        errors = [nmse(flat(call.output), flat(work.output(call))) for call in calls]
    work.advance()
    damage = float(torch.stack(errors).double().mean())
    if not math.isfinite(damage):
        raise CalibrationError(
            f"'{work.component}' gives NaN or inf with {_words(specs)}; "
            f"take that format out of {word}.formats, or leave the layer out with 'on'"
        )
    return damage


def _words(specs: Mapping[str, Specs]) -> str:
    (name, one), *others = specs.items()
    return f"the formats that were tried for all {len(specs)} layers" if others else f"{one.weight} weights in layer '{name}'"


def flat(output: Any) -> Tensor:
    """All tensors of an output, one after the other: ``[values]`` float32."""
    return torch.cat([leaf.float().flatten() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])


def _stored_bytes(work: ModelWork, name: str, specs: Specs) -> int:
    """Bytes of the codes and scales of a weight; the bias stays float32 whatever the format is."""
    bias = getattr(work.float_layer(name), "bias", None)
    return work.layer_bytes(name, specs) - (4 * bias.numel() if isinstance(bias, Tensor) else 0)


def _problems(word: str, site: StageSite, specs: Specs) -> list[str]:
    """Why stages earlier in the recipe cannot work with these numbers."""
    answers = [stage.supports(replace(site, specs=specs, before=site.before[:number])) for number, stage in enumerate(site.before)]
    return [f"with {specs.weight} weights, as {word} may choose: {answer}" for answer in answers if answer]
