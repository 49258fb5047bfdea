"""What stages see of one layer: its specs before sampling, its weight and scales while it is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from reelquant.formats import Quantizer, QuantSpec
from reelquant.kernels import FrameBands
from reelquant.observe import InputStatistics
from reelquant.sites import Layer
from reelquant.stages.rewrite import Rewrite


class Specs(NamedTuple):
    """The numbers of a layer: of its weight, and of its input (None: the input stays float)."""

    weight: QuantSpec
    input: QuantSpec | None = None


@dataclass(frozen=True)
class StageSite:
    """One layer as a stage meets it before anything is sampled.

    Attributes:
        layer: what discovery knows.
        specs: the numbers that the recipe's rules give it.
        before: the stages that touch the same layer earlier in the recipe.
    """

    layer: Layer
    specs: Specs
    before: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Solution:
    """Codes for one weight.

    Attributes:
        quantizer: format and scales.
        codes: ``[out, in]`` uint8.
        solver: the name of what chose the codes.
        replaced: name of the solver that was given up for ``nearest``, or None.
        input_scale: ``[rows, units]`` float32, other scales of the layer's static input, in the order in which it stores them; None if
            they stay.
        branches: other values of tensors of the layer's branches, by name, in the dtypes in which it stores them.
        kept: how many of consecutive weights are not zero, as :class:`reelquant.formats.Kept` reads it; empty if nothing was removed.
    """

    quantizer: Quantizer
    codes: Tensor
    solver: str = "nearest"
    replaced: str | None = None
    input_scale: Tensor | None = None
    branches: Mapping[str, Tensor] = field(default_factory=dict)
    kept: str = ""

    @property
    def values(self) -> Tensor:
        """The weight as these codes have it, ``[out, in]`` float32."""
        return self.quantizer.dequantize(self.codes)


@dataclass(frozen=True, eq=False)
class LayerWork:
    """One layer while it is built. Stages return changed copies (:func:`dataclasses.replace`).

    Attributes:
        site: name, role and specs.
        weight: the float weight ``[out, channels, *kernel]``, float32.
        target: what the codes have to stand for: the rewritten weight, less what branches took over. Same shape.
        bias: ``[out]`` float32 of the float layer, or None.
        inside: the rewrite that the layer does to what it reads. Branches do not see it.
        outside: the rewrite that the norm before the layer does, so that the layer reads ``outside.input(x)``.
        statistics: of the raw input; None without calibration.
        timesteps: of calibration, in sampling order; slots of per-step scales.
        unseen: whether ranges are extended to what later clips may reach.
        correct_bias: whether the bias takes over the mean error of the rounded weight.
        inputs: a quantizer of the input per slot; None if the input stays float or is ranged in the forward.
        stored_inputs: the quantizers that the layer stores, if they are more than ``inputs``: rows per guidance half.
        solution: the codes.
        stored_bias: ``[out]`` float32, the bias of the quantized layer, once the codes are known.
        branches: (branch, its tensors by name), outermost first.
        bands: how the frames of the input are mixed around the product; None for no mix.
        rows, columns: which rows and columns of the weight are not zero and are stored, as :class:`reelquant.formats.Leading` reads it;
            empty for all.
    """

    site: StageSite
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    inside: Rewrite
    outside: Rewrite = field(default_factory=Rewrite)
    statistics: InputStatistics | None = None
    timesteps: Sequence[float] = ()
    unseen: bool = False
    correct_bias: bool = False
    inputs: Sequence[Quantizer] | None = None
    stored_inputs: Sequence[Quantizer] | None = None
    solution: Solution | None = None
    stored_bias: Tensor | None = None
    branches: tuple[tuple[Any, Mapping[str, Tensor]], ...] = ()
    bands: FrameBands | None = None
    rows: str = ""
    columns: str = ""

    @property
    def matrix(self) -> Tensor:
        """:attr:`target` as a matrix ``[out, channels * taps]``."""
        return self.target.flatten(1)

    @property
    def taps(self) -> int:
        """Places of a convolution's window; 1 for a linear layer."""
        return self.weight[0, 0].numel()

    @property
    def rewrite(self) -> Rewrite:
        """Of the raw input, complete."""
        return self.outside.then(self.inside)

    def with_branch(self, branch: Any, tensors: Mapping[str, Tensor], target: Tensor) -> LayerWork:
        """The layer after a branch took a part of its weight over.

        Args:
            target: what is left to round, in the coordinates of the rewritten input.
        """
        return replace(self, target=target, branches=(*self.branches, (branch, tensors)))

    def with_input_scale(self, scale: Tensor | None) -> LayerWork:
        """The layer with other scales of its static input, ``[rows, units]`` as it stores them; None changes nothing."""
        rows = self.stored_inputs or self.inputs
        if scale is None or not rows:
            return self
        moved = [replace(row, scale=one) for row, one in zip(rows, scale.unbind(), strict=True)]
        return replace(self, inputs=moved) if self.stored_inputs is None else replace(self, stored_inputs=moved)

    def with_branch_tensors(self, tensors: Mapping[str, Tensor]) -> LayerWork:
        """The layer with other values of some tensors of its branches."""
        if not tensors:
            return self
        moved = tuple((branch, {name: tensors.get(name, value) for name, value in own.items()}) for branch, own in self.branches)
        return replace(self, branches=moved)

    def branch_weight(self) -> Tensor | float:
        """What all branches together multiply with the input that the layer reads, ``[out, channels, *kernel]``; 0 for nothing."""
        shape = tuple(self.weight.shape)
        shares = [branch.weight(tensors, shape) for branch, tensors in self.branches]
        return sum((share for share in shares if share is not None), start=0.0)

    def bias_for(self, values: Tensor) -> Tensor | None:
        """The bias of the quantized layer if its codes stand for these values, float32; None if it needs none.

        ``b + W mu - W_q x'(mu) - B u(mu)``, with the rewritten input ``x'``, the input ``u`` that the layer reads, and ``B`` the part of
        the weight that branches took over: the mean output is that of the float layer, whatever rounding did to the weight. Without
        :attr:`correct_bias` zero takes the place of the mean ``mu``: only shifts are compensated, and the constant part cancels code
        by code.

        Args:
            values: ``[out, channels * taps]`` float32; gradients flow through.
        """
        if (mean := self._compensated_input()) is None:
            return self.bias
        extra = self.weight.flatten(1) @ mean - values @ self.rewrite.per_tap(self.taps).input(mean)
        branch = self.branch_weight()
        if isinstance(branch, Tensor):
            extra = extra - branch.flatten(1) @ self.outside.per_tap(self.taps).input(mean)
        return extra if self.bias is None else self.bias + extra

    def bias_terms(self) -> tuple[Tensor | None, Tensor | None]:
        """:meth:`bias_for` in two parts, for values that change often: ``constant - values @ direction``.

        Returns:
            constant: ``[out]``; None if no layer with these codes needs a bias.
            direction: ``[channels * taps]``; None if the bias does not follow the values.
        """
        if (mean := self._compensated_input()) is None:
            return self.bias, None
        return self.bias_for(self.matrix.new_zeros(self.matrix.shape)), self.rewrite.per_tap(self.taps).input(mean)

    def _compensated_input(self) -> Tensor | None:
        """The input whose output the bias keeps, ``[channels * taps]``: the mean one, or zero; None if the bias stays as it is."""
        if self.correct_bias and self.statistics is not None:
            return self._mean_input()
        return None if self.rewrite.shift is None else self.weight.new_zeros(self.weight[0].numel())

    def _mean_input(self) -> Tensor:
        """Mean of the raw input, ``[channels * taps]``, from the best statistic there is."""
        seen = self.statistics
        assert seen is not None
        if seen.gram is not None:
            return seen.gram.mean
        if seen.rows is not None:
            return seen.rows.rows.mean(0).to(self.weight.device)
        return seen.range.mean.mean((0, 1)).repeat_interleave(self.taps)
