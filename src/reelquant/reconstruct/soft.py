"""Quantized layers that can be trained: their weight and the scales of their input are parameters until they are hardened."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.branches import Branch
from reelquant.clock import FLOAT, OWN, Moment
from reelquant.kernels import InputQuant, Window
from reelquant.nn import LayerLayout, QuantLayer, get_module, set_module
from reelquant.nn.runners.branch import with_branches
from reelquant.nn.runners.guidance import GuidanceHalves
from reelquant.reconstruct.drop import Drop
from reelquant.reconstruct.input_scales import InputScales
from reelquant.stages import BlockWork, LayerWork, Solution


class SoftWeight(nn.Module):
    """A weight that is a function of parameters. It starts as the weight of the layer's codes."""

    @abstractmethod
    def values(self, *, hard: bool) -> Tensor:
        """``[out, channels * taps]`` float32: with gradients, or ``hard``: the very values of :meth:`solution`."""

    @abstractmethod
    def solution(self) -> Solution:
        """The codes that the parameters stand for."""


class Fixed(SoftWeight):
    """A weight that does not change: that of given codes, or of the layer's own."""

    def __init__(self, solution: Solution) -> None:
        super().__init__()
        self._solution, self._values = solution, solution.values

    @classmethod
    def of(cls, layer: QuantLayer, work: LayerWork) -> Fixed:
        """The weight that a layer stores."""
        del work
        return cls(Solution(layer.packed.quantizer, layer.packed.unpacked()))

    def values(self, *, hard: bool) -> Tensor:
        del hard
        return self._values

    def solution(self) -> Solution:
        return self._solution


class _Passed(torch.autograd.Function):
    """The second tensor, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: Tensor) -> Tensor:
        del ctx, x
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        del ctx
        return grads[0], None


class SoftLayer(nn.Module):
    """Stands for a quantized layer, with a weight and scales of its input that gradients can change.

    Everything else is that of the layer: the rewrite of its input (none if a norm has taken it over), the rounding of
    its input at the current denoising step, branches. The bias follows the weight by
    :meth:`reelquant.stages.LayerWork.bias_for`. Where the scales of the input are not learned, rounding has the gradient of the identity.

    Attributes:
        layer: the quantized layer.
        work: what it was made of.
        weight: the trained weight.
        scales: the trained scales of the input, or None.
        tensors: the trained tensors of the layer's branches, by name.
        drop: leaves some of the rounded inputs float while the layer is soft; or None.
        hard: whether the layer is the one that its :meth:`solution` gives; then the output is that of the reference kernel.
    """

    def __init__(
        self, layer: QuantLayer, work: LayerWork, weight: SoftWeight, scales: InputScales | None = None, tensors: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.layer, self.work, self.hard = layer, work, True
        self.weight, self.scales = weight, scales
        self.drop: Drop | None = None
        self._given: Tensor | None = None
        self._taken: Mapping[str, Tensor] = {}
        self._bias_terms: tuple[Tensor | None, Tensor | None] | None = None
        self.tensors = nn.ParameterDict({name: nn.Parameter(layer._buffers[name].float()) for name in tensors})  # type: ignore[union-attr]

    @property
    def layout(self) -> LayerLayout:
        """Of the layer."""
        return self.layer.layout

    @property
    def window(self) -> Window | None:
        """Of the layer."""
        return self.layer.window

    def branch_tensors(self, branch: Branch) -> dict[str, Tensor]:
        """The tensors of one branch as they are now; while the layer is hard, as it would store them."""
        known = self.layer.branch_tensors(branch)
        return {name: self._tensor(name, value) for name, value in known.items()}

    def _tensor(self, name: str, stored: Tensor) -> Tensor:
        if name not in self.tensors:
            return self._taken.get(name, stored)
        return self.tensors[name].detach().to(stored.dtype) if self.hard else self.tensors[name]

    def forward(self, input: Tensor) -> Tensor:
        clock = self.layer.clock
        chain = with_branches(self, self._product)
        if self.layer.layout.cfg_halves:
            chain = GuidanceHalves(self.layer, chain)
        return chain(input, clock[0].now(self.layer.bits_group) if clock else Moment(), "")

    def _product(self, x: Tensor, moment: Moment, activation: str) -> Tensor:
        """Product of the rounded input with the weight as it is now; ``activation`` is always empty here."""
        operands = self.layer.operands
        rewritten = self._rounded(operands.rewritten_input(operands.padded(x)), moment)
        values = self.weight.values(hard=self.hard)
        return operands.product(rewritten, values.reshape(self.layer.weight_shape), self._bias(values)).to(x.dtype)

    def _rounded(self, x: Tensor, moment: Moment) -> Tensor:
        """The rewritten input as this step rounds it."""
        inputs = self._input_quant(moment)
        if inputs is None:
            return x
        quantizer = inputs.quantizer(x.detach(), moment.slot if moment.row is None else moment.row)
        learned = None if self.hard else self.scales
        found = _Passed.apply(x, quantizer(x.detach())) if learned is None else learned.rounded(quantizer, x)
        return found if self.hard or self.drop is None else self.drop(found, x)

    def _input_quant(self, moment: Moment) -> InputQuant | None:
        """How the input is rounded at this step, in the bits of this step."""
        inputs, bits = self.layer.operands.input, moment.widths.inputs
        if inputs is None or bits == FLOAT:
            return None
        if self._given is not None:
            inputs = replace(inputs, scale=self._given)
        inputs = inputs if self.scales is None else self.scales.of(inputs)
        return inputs if bits == OWN else inputs.with_bits(bits)

    def _bias(self, values: Tensor) -> Tensor | None:
        """The bias as the layer would store it, float32."""
        bias, stored = self._bias_for(values), self.layer.bias
        return None if bias is None or stored is None else bias.to(stored.dtype).float()

    def _bias_for(self, values: Tensor) -> Tensor | None:
        if self.hard or self._branches_move:
            return self._work().bias_for(values)
        if self._bias_terms is None:
            self._bias_terms = self.work.bias_terms()
        constant, direction = self._bias_terms
        return constant if constant is None or direction is None else constant - values @ direction

    @property
    def _branches_move(self) -> bool:
        return bool(self.tensors or self._taken)

    def _work(self) -> LayerWork:
        """What the layer was made of, with its branches as they are now."""
        if not self._branches_move:
            return self.work
        return self.work.with_branch_tensors(
            {name: value for one in self.layout.branches for name, value in self.branch_tensors(one).items()}
        )

    def take(self, solution: Solution) -> None:
        """Become the layer that has these codes and scales."""
        self.weight, self.scales, self._given = Fixed(solution), None, solution.input_scale
        self.tensors, self._taken = nn.ParameterDict(), solution.branches

    def solution(self) -> Solution:
        """What the layer has learned."""
        learned = {name: value.detach().to(self.layer._buffers[name].dtype) for name, value in self.tensors.items()}  # type: ignore[union-attr]
        found = replace(self.weight.solution(), branches=learned)
        return found if self.scales is None else replace(found, input_scale=self.scales.scale().detach())

    @property
    def learns(self) -> bool:
        """Whether anything of the layer can be trained."""
        return any(True for part in (self.weight, self.scales, self.tensors) if part is not None for _ in part.parameters())


WeightOf = Callable[[QuantLayer, LayerWork], SoftWeight]
ScalesOf = Callable[[Tensor, LayerWork], InputScales]


def soften(
    block: BlockWork, weight: WeightOf = Fixed.of, scales: ScalesOf | None = None, *, branches: bool = False
) -> tuple[BlockWork, Mapping[str, SoftLayer]]:
    """The block with soft layers in the places of the layers that may change, and these by path. Only they can be
    trained.

    The module of ``block`` is changed, except where it is the layer itself.

    Args:
        weight: makes the trained weight of a layer; that of its codes by default, which does not change.
        scales: makes trained scales of its static input; None: they do not change.
        branches: whether tensors of branches are trained that say so.
    """
    block.module.requires_grad_(False)
    soft = {path: _soft(_layer(block.module, path), work, weight, scales, branches=branches) for path, work in block.layers.items()}
    if "" in soft:
        return replace(block, module=soft[""]), soft
    for path, layer in soft.items():
        set_module(block.module, path, layer)
    return block, soft


def _soft(layer: QuantLayer, work: LayerWork, weight: WeightOf, scales: ScalesOf | None, *, branches: bool) -> SoftLayer:
    inputs = layer.operands.input
    learned = None if scales is None or inputs is None or inputs.scale is None else scales(inputs.scale, work)
    names = [name for branch in layer.layout.branches for name in branch.learns] if branches else []
    return SoftLayer(layer, work, weight(layer, work), learned, names)


def harden(soft: Sequence[SoftLayer], hard: bool) -> None:
    """Let layers be what their solutions give, or trainable again."""
    for layer in soft:
        layer.hard = hard


def _layer(module: nn.Module, path: str) -> QuantLayer:
    layer = get_module(module, path)
    assert isinstance(layer, QuantLayer), "the engine puts quantized layers into the module of a block"
    return layer
