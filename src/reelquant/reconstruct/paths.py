"""Where errors of a denoiser's outputs lead: which recorded calls make one run of the sampler, and how far each moves the latents."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from reelquant.clock import holds_twice
from reelquant.observe import RecordedCall

UNEXPLAINED = 0.05
"""Share of the sampler's movement that outputs may leave unexplained, in squares. One-step samplers (Euler, DDIM) leave none."""


class Moment(NamedTuple):
    """The calls of one denoising step of one clip, or of the clips of one batch.

    Attributes:
        numbers: of the recorded calls: one, or the two of guidance.
        outputs: tensors of one shape: of each call, or the two halves of a call that holds its latents twice.
        latents: what all of them start from, in the same shape.
    """

    numbers: tuple[int, ...]
    step: int
    outputs: tuple[Tensor, ...]
    latents: Tensor


class Path(NamedTuple):
    """The calls of one run of the sampler.

    Attributes:
        shares: by number of a call, how far the sampler moves the latents per unit of its output, one for each half that the call holds.
    """

    shares: dict[int, tuple[float, ...]]

    def moved(self, number: int, error: Tensor) -> Tensor:
        """How far an error in the output of a call moves the latents."""
        shares = self.shares[number]
        return torch.stack([share * part for share, part in zip(shares, error.chunk(len(shares)), strict=True)]).sum(0)


def tensor_of(output: object) -> Tensor:
    """The first tensor of floats in an output."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()).float()


def paths(calls: Sequence[RecordedCall]) -> list[Path]:
    """The runs of the sampler that were recorded whole; none if calls are missing, or if outputs do not explain how latents move.

    From a step to the next, latents are a multiple of what they were plus multiples of the outputs. The multiples are found by least
    squares, so no scheduler is read and no guidance scale is told. The result of the last step is not recorded: its shares are those
    of the step before. An error is taken to stay in the latents as it is.
    """
    runs = list(_runs(list(_moments(calls))))
    forms = {tuple((moment.step, len(moment.outputs)) for moment in run) for run in runs}
    if len(forms) != 1 or len(steps := forms.pop()) < 2 or len({count for _, count in steps}) > 1:
        return []
    shares = [_shares([(run[place], run[place + 1]) for run in runs]) for place in range(len(steps) - 1)]
    known = [row for row in shares if row is not None]
    return [_path(run, [*known, known[-1]]) for run in runs] if len(known) == len(shares) else []


def _path(run: Sequence[Moment], shares: Sequence[Sequence[float]]) -> Path:
    known: dict[int, tuple[float, ...]] = {}
    for moment, row in zip(run, shares, strict=True):
        of_each = [(share,) for share in row] if len(moment.numbers) > 1 else [tuple(row)]
        known |= dict(zip(moment.numbers, of_each, strict=True))
    return Path(known)


def _moments(calls: Sequence[RecordedCall]) -> Iterator[Moment]:
    last: Moment | None = None
    for number, call in enumerate(calls):
        output = tensor_of(call.output)
        latents = next((leaf.float() for leaf in _floats(call) if leaf.shape == output.shape), output)
        if last is not None and call.step == last.step and len(last.numbers) == 1 and torch.equal(latents, last.latents):
            last = last._replace(numbers=(*last.numbers, number), outputs=(*last.outputs, output))
            continue
        if last is not None:
            yield last
        if bool(holds_twice(latents)):
            last = Moment((number,), call.step, output.chunk(2), latents.chunk(2)[0])
        else:
            last = Moment((number,), call.step, (output,), latents)
    if last is not None:
        yield last


def _floats(call: RecordedCall) -> Iterator[Tensor]:
    leaves = tree_leaves((call.args, dict(call.kwargs)))
    return (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _runs(moments: Sequence[Moment]) -> Iterator[list[Moment]]:
    starts = [place for place, moment in enumerate(moments) if place == 0 or moment.step <= moments[place - 1].step]
    for first, beyond in itertools.pairwise([*starts, len(moments)]):
        yield list(moments[first:beyond])


def _shares(pairs: Sequence[tuple[Moment, Moment]]) -> list[float] | None:
    """Multiples of the outputs of a step that, with a multiple of its latents, give the latents of the next step."""
    matrix = torch.cat([torch.stack([now.latents, *now.outputs]).flatten(1).double() for now, _ in pairs], 1)
    wanted = torch.cat([after.latents.double().flatten() for _, after in pairs])
    found = torch.linalg.lstsq(matrix @ matrix.T, (matrix @ wanted)[:, None]).solution[:, 0]
    moved = wanted - found[0] * matrix[0]
    rest = (wanted - found @ matrix).square().sum() / moved.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return None if not float(rest) <= UNEXPLAINED else found[1:].tolist()
