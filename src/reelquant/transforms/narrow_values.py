"""Fewer channels between the values and the output projection of attention: the directions of each head that matter least are left out."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from reelquant._errors import RecipeError, UnsupportedError
from reelquant.formats import Leading, fit, packed_width
from reelquant.stages import LayerWork, ModelWork, Stage, StageSite

AFTER = frozenset({"rewrite", "split", "solve_layer", "solve_block"})
"""Hooks in which a stage works on weights that this one has changed already."""

STILL = 1e-9
"""Share of the largest variance of a head below which a direction counts as one that never moves: sums are float32."""


class Pair(NamedTuple):
    """The two layers around the attention of some heads.

    Attributes:
        values: the layer that makes the values.
        reader: the layer that reads what attention makes of them.
        heads: of attention.
    """

    values: nn.Module
    reader: nn.Module
    heads: int


class Moments(NamedTuple):
    """Of an input ``[..., heads * width]``, head by head.

    Attributes:
        mean: ``[heads, width]`` float64.
        covariance: ``[heads, width, width]`` float64, around the mean.
    """

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class NarrowValues(Stage):
    r"""Rotate the values of every head so that its last channels matter least for the output of attention, and leave these out.

    Attention is ``softmax(Q K^T) V`` in every head, and mixing over tokens changes places with a mix of the channels of a head. So with
    orthonormal ``B``, values ``B^T W_V x`` and the output projection ``W_O B`` give the same output. With fewer columns in ``B`` they do
    not, and the best ``r`` of them follow from what the output projection reads: with the covariance ``C`` of a head's mixed values and
    its columns ``W`` of the output projection, the nearest matrix of rank ``r`` is ``U U^T W`` with the first left singular vectors
    ``U`` of ``W C^(1/2)``, and its error is the sum of the squares of the other singular values. ``B`` spans the rows of ``U^T W``, and
    the output projection becomes ``U U^T W B``. What is left out keeps its mean, which the bias of the output projection takes
    over. A projection without bias has moments around zero instead of ``C``.

    Both float weights are changed in place, before anything is observed: the last channels of each head are zero rows of the one and zero
    columns of the other. Quantized layers do not store them (:class:`reelquant.formats.Leading`), and compute them as zeros: the file is
    smaller, and nothing is faster. Errors of heads count as if they had nothing to do with each other. The covariance is that of what the
    output projection reads in recorded calls; that of the values themselves would give an upper bound, because attention averages tokens.

    Pairs of layers are those that discovery saw (:attr:`reelquant.sites.Layer.heads_out`), self-attention and cross-attention alike.
    Heads that share values, projections that are fused with others, and norms, gates or adapters on values have no such pair.

    Attributes:
        keep: share of the channels of each head, rounded to a channel; 1 changes the order and leaves nothing out.
        clips: how many texts of calibration are sampled for the covariances.
        calls: how many calls of the denoiser are recorded there, evenly over all; up to twice as many.

    Paper: COMCAT (arXiv 2305.17235), low rank of the product of value and output projections. Deviations: the best directions for the
    inputs that are seen (theirs: of the weights, then trained); the same share in every head (theirs: ranks are searched); queries and
    keys keep theirs, because norms and rotary positions lie between them; zeros are computed. An adapter (LoRA) on either layer would
    meet other channels than those it was trained with: merge it before quantizing.
    """

    keep: float = 0.75
    clips: int = 4
    calls: int = 32
    default_on: ClassVar[str] = "role:main | role:prompt"
    in_memory: ClassVar[str | None] = "narrow_values changes two float layers at once"
    untrainable: ClassVar[str | None] = "of which rows or columns are not stored, which training would bring back"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or self.clips < 1 or self.calls < 1:
            raise RecipeError(f"narrow_values takes keep in (0, 1], clips and calls of 1 or more, got {self}")

    # --- before anything is sampled ---------------------------------------------------------------------------------------------

    def supports(self, site: StageSite) -> str | None:
        if not self.leaves_out(site):
            return None
        if any(AFTER.intersection(stage.hooks()) for stage in site.before):
            return "narrow_values changes the float weight before all other steps; make it the first one"
        probe = torch.linspace(-1, 1, 2 * site.layer.shape[1]).view(2, -1)
        if bool(fit(site.specs.weight, probe)(torch.zeros_like(probe)).any()):
            return f"narrow_values needs a format with a zero, got {site.specs.weight.format.name}"
        return None

    def leaves_out(self, site: StageSite) -> frozenset[str]:
        rows, columns = self._parts(site)
        return frozenset(name for name, part in (("rows", rows), ("columns", columns)) if str(part))

    def stored_bytes(self, site: StageSite) -> int:
        rows, columns = self._parts(site)
        height, width, bits = site.layer.shape[0], math.prod(site.layer.shape[1:]), site.specs.weight.format.bits
        return rows.count(height) * packed_width(columns.count(width), bits) - height * packed_width(width, bits)

    def held_out_runs(self, steps: int) -> int:
        return 1  # it samples texts of calibration, no more than the held-out ones

    def own_calls(self, layers: int) -> int:
        return 2 * self.calls  # up to twice as many as wanted are recorded

    def _parts(self, site: StageSite) -> tuple[Leading, Leading]:
        """The rows and the columns of a layer's weight that are kept."""
        shape, layer = site.layer.shape, site.layer
        return self.part(shape[0], layer.heads_out), self.part(shape[1], layer.heads_in)

    def part(self, channels: int, heads: int) -> Leading:
        """The channels of each head that are kept, if channels are those of heads; else all."""
        if not heads:
            return Leading(1, 1)
        width = channels // heads
        return Leading(max(1, round(self.keep * width)), width)

    # --- before anything is observed --------------------------------------------------------------------------------------------

    def before_observing(self, work: ModelWork) -> None:
        pairs = self.pairs(work)
        moments = look(work, pairs, work.sampled_calls(self.clips, self.calls))
        for pair, seen in zip(pairs, moments, strict=True):
            parameters = [*pair.values.parameters(recurse=False), *pair.reader.parameters(recurse=False)]
            before = [parameter.detach().clone() for parameter in parameters]
            work.undo(functools.partial(put_all, parameters, before))
            narrow(pair, seen, self.part(pair.heads * seen.mean.shape[1], pair.heads).keep)

    def pairs(self, work: ModelWork) -> list[Pair]:
        """All pairs whose layers the stage touches, in execution order.

        Raises:
            UnsupportedError: if there are none, or if one of the layers of a pair is left alone.
        """
        touched, layers, found = set(work.touched(self)), work.map.layers, []
        for group in work.map.groups:
            names = (group.source or "", group.name)
            if not layers[group.name].heads_in or not touched.intersection(names):
                continue
            if alone := [name for name in names if name not in touched]:
                raise UnsupportedError(f"narrow_values changes '{names[0]}' and '{names[1]}' together, and '{alone[0]}' stays as it is")
            values, reader = (work.denoiser.get_submodule(name) for name in names)
            found.append(Pair(values, reader, layers[group.name].heads_in))
        if not found:
            raise UnsupportedError(
                f"narrow_values finds no attention in {work.map.cls} whose values come from a linear layer of their own and go straight to "
                "another one: fused projections, heads that share values, and norms, gates or adapters between the two are not narrowed"
            )
        return found

    # --- while layers are built -------------------------------------------------------------------------------------------------

    def solve_layer(self, layer: LayerWork) -> LayerWork:
        """The layer with the rows and columns that it stores, if the others are zero (they are not in a model that was not changed)."""
        (rows, columns), weight = self._parts(layer.site), layer.weight.flatten(1)
        kept = torch.zeros_like(weight, dtype=torch.bool)
        kept[rows.places(len(weight), weight.device)[:, None], columns.places(weight.shape[1], weight.device)] = True
        return layer if bool(weight[~kept].any()) else replace(layer, rows=str(rows), columns=str(columns))


@torch.no_grad()
def look(work: ModelWork, pairs: Sequence[Pair], calls: Sequence[Any]) -> list[Moments]:
    """Moments of what the second layer of each pair reads in these calls of the denoiser.

    Raises:
        UnsupportedError: if there are no calls.
    """
    sums = [_Sums(pair.heads) for pair in pairs]
    hooks = [pair.reader.register_forward_pre_hook(one.see, with_kwargs=True) for pair, one in zip(pairs, sums, strict=True)]
    try:
        for call in calls:
            work.output(call)
    finally:
        for hook in hooks:
            hook.remove()
    if not all(one.count for one in sums):
        raise UnsupportedError(
            f"narrow_values sees no call of {work.map.cls} while the pipeline samples texts, so it knows of no directions"
        )
    return [one.moments(around_mean=pair.reader.bias is not None) for pair, one in zip(pairs, sums, strict=True)]


class _Sums:
    """Sums over the rows that a layer reads, around the mean of the first call: a large mean would cost the covariance its precision."""

    def __init__(self, heads: int) -> None:
        self.heads, self.count, self.origin = heads, 0, torch.zeros(())
        self.total, self.square = torch.zeros(()), torch.zeros(())

    def see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        rows = (args[0] if args else kwargs["input"]).detach().flatten(0, -2).float().unflatten(-1, (self.heads, -1)).movedim(1, 0)
        if not self.count:
            self.origin = rows.mean(1, keepdim=True)
            self.total, self.square = (self.origin.double() * 0, self.origin.double().mT @ self.origin.double() * 0)
        rows = rows - self.origin
        self.count += rows.shape[1]
        self.total = self.total + rows.sum(1, keepdim=True)
        self.square = self.square + rows.mT @ rows

    def moments(self, *, around_mean: bool) -> Moments:
        """Mean and covariance; without a bias that could take the mean over, zero and the second moment."""
        away = self.total / self.count  # of the mean from the origin
        covariance = self.square / self.count - away.mT @ away
        mean = away + self.origin
        if around_mean:
            return Moments(mean.squeeze(1), covariance)
        return Moments(torch.zeros_like(mean.squeeze(1)), covariance + mean.mT @ mean)


@torch.no_grad()
def narrow(pair: Pair, seen: Moments, keep: int) -> None:
    """Change the two layers of a pair in place so that ``keep`` channels of every head are left, the first ones."""
    first, second = (layer.get_parameter("weight") for layer in (pair.values, pair.reader))
    values, output = first.double().unflatten(0, (pair.heads, -1)), second.double().unflatten(1, (pair.heads, -1)).movedim(1, 0)
    basis, reader = directions(output, seen.covariance.to(output), keep)
    lost = output - reader @ basis.mT
    put(first, padded(basis.mT @ values, len(values[0]), 1).flatten(0, 1))
    put(second, padded(reader, output.shape[2], 2).movedim(0, 1).flatten(1))
    if isinstance(bias := pair.values.bias, nn.Parameter):
        channels = bias.double().view(pair.heads, -1, 1)
        put(bias, padded(basis.mT @ channels, channels.shape[1], 1).flatten())
    if isinstance(bias := pair.reader.bias, nn.Parameter):
        put(bias, bias.double() + (lost @ seen.mean.to(lost)[..., None]).sum(0).squeeze(-1))


def directions(output: Tensor, covariance: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The channels of each head that an output projection keeps, and what it becomes for them.

    A direction that never moved counts by its weights, behind all others: few tokens span few directions.

    Args:
        output: columns of the output projection ``[heads, out, width]``.
        covariance: of what they multiply, ``[heads, width, width]``.
        keep: how many.

    Returns:
        basis: ``[heads, width, keep]``, orthonormal columns; channels become ``basis^T x``.
        output: ``[heads, out, keep]``; times ``basis^T`` it is the matrix of rank ``keep`` with the least error.
    """
    sizes, axes = torch.linalg.eigh(covariance)
    still = (STILL * sizes.amax(-1, keepdim=True)).clamp(min=torch.finfo(sizes.dtype).tiny)
    largest = torch.linalg.svd(output @ (axes * sizes.maximum(still).sqrt().unsqueeze(-2)), full_matrices=False)[0][..., :keep]
    basis = torch.linalg.qr(output.mT @ largest)[0]
    return basis, largest @ (largest.mT @ output @ basis)


def padded(x: Tensor, size: int, axis: int) -> Tensor:
    """Zeros behind the last place of an axis, up to a size."""
    shape = list(x.shape)
    shape[axis] = size - x.shape[axis]
    return torch.cat([x, x.new_zeros(shape)], axis)


@torch.no_grad()
def put(parameter: Tensor, value: Tensor) -> None:
    """Write values into the memory of a parameter."""
    parameter.copy_(value)


def put_all(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """:func:`put` for each."""
    for parameter, value in zip(parameters, values, strict=True):
        put(parameter, value)
