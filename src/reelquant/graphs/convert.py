"""One quantized layer as operators of OpenVINO: its codes, scales, shifts, rotations, per-step scales and tables as they are.

Two forms, chosen layer by layer:

* *integers*: the input is rounded by a ``FakeQuantize`` with a constant range in units of codes, and meets ``Constant(i8) -> Convert ->
  Multiply``. OpenVINO's low-precision transformations make products of bytes out of that pattern, and of nothing else.
* *floats*: the input is rounded by ``Round`` and ``Clamp``, which they leave alone, or not at all. Large linear layers with float inputs
  keep their codes in memory: the processor plugin widens them inside of its product. Elsewhere the graph holds floats, which is faster.

A scale per denoising step is multiplied before and after the product, from a table by the graph's input ``slot``, so the range that the
graph rounds to stays constant. Zero points become a part of the bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import openvino
import openvino.opset13 as ops
import torch
from torch import Tensor

from reelquant._errors import UnsupportedError
from reelquant.formats import FOUND_AT_RUN_TIME, Int
from reelquant.graphs.borders import added_by, by_position, keeps_sizes, zeros_become
from reelquant.graphs.processor import PAIRS, integers_saturate
from reelquant.kernels import InputQuant, Mix, Operands, Permutation, Rotation, Scaling, block_size, hadamard
from reelquant.kernels.cpu import int8, nibbles
from reelquant.nn import QuantLayer
from reelquant.nn.runners.table import folded_refusal

Node = Any  # openvino.Output or openvino.Node, whichever the operator before gave
LEVELS = 256  # the only number of levels that low-precision transformations take
NAMED = "reelquant."  # and the number of a layer: names of its product
SMALL = (
    1 << 18
)  # weights up to which a float product gets floats: the plugin would widen the codes in every call, which costs a third there
WIDEST = 64  # of one matrix of a rotation; wider blocks are rotated by two


class Weight(NamedTuple):
    """8-bit codes ``[out, width]`` and a scale per row ``[out]``."""

    codes: Tensor
    scale: Tensor


@dataclass(eq=False)
class Conversion:
    """What the layers of one graph share.

    Attributes:
        slot: the step, an int64 scalar; an input of the graph.
        exact: whether the graph answers from tables of outputs.
        rounded: inputs that are rounded already: layers that read one tensor with the same numbers share it.
    """

    slot: Node
    exact: bool
    rounded: dict[tuple[Any, ...], Node] = field(default_factory=dict)

    def of_slot(self, table: Tensor) -> Node:
        """The row of the step, ``[...]``; of a table of one row a constant."""
        values = constant(table)
        return constant(table[0]) if len(table) == 1 else ops.gather(values, self.slot, ops.constant(np.int64(0)))


def constant(values: Tensor) -> Node:
    """A float32 constant."""
    return ops.constant(np.ascontiguousarray(values.detach().float().numpy()))


def in_integers(operands: Operands) -> str | None:
    """Why products of a layer are not integer ones in the graph, or None if they are."""
    numbers, weight = operands.input, operands.weight.quantizer
    if numbers is None:
        return "the input stays float"
    static = numbers.rule is None and numbers.granularity.kind == "tensor"
    if not isinstance(numbers.format, Int) or not (static or _found_at_run_time(operands)):
        return f"inputs are {numbers.format.name} per {numbers.granularity}{' and dynamic' if numbers.rule else ''}"
    if not isinstance(weight.format, Int) or not weight.format.signed:
        return f"weights are {weight.format.name}, not symmetric integers"
    if weight.granularity.kind == "group" and weight.format.bits != 4:
        return f"weights have a scale per {weight.granularity}"
    largest = 127 if weight.granularity.kind == "group" else 2 ** (weight.format.bits - 1)
    if integers_saturate() and 2 * 255 * largest > PAIRS:
        return f"without VNNI instructions pairs of 8-bit products are cut off at {PAIRS}; codes of weights up to 64 are safe"
    return None


def _found_at_run_time(operands: Operands) -> bool:
    """Whether inputs are symmetric integers whose scale is found in the forward: per token, or per sample of a convolution."""
    numbers = operands.input
    if numbers is None or numbers.granularity.kind != ("token" if operands.window is None else "sample"):
        return False
    return _covers(numbers)


def _covers(numbers: InputQuant) -> bool:
    """Whether these are symmetric integers with dynamic scales that clip nothing."""
    return isinstance(numbers.format, Int) and numbers.format.signed and numbers.rule is not None and numbers.rule.range.covers_all


def emit(layer: QuantLayer, x: Node, to: Conversion) -> Node:
    """The output of a layer."""
    if layer.layout.table and to.exact:
        return _from_table(layer, x, to)
    if layer.layout.folded:
        raise UnsupportedError(folded_refusal(layer))
    return Emission(layer.operands, to, f"{NAMED}{layer.handle}").product(x)


def _from_table(layer: QuantLayer, x: Node, to: Conversion) -> Node:
    """The stored output of the step for every row of the input; an unused layer answers with zeros."""
    out = layer.weight_shape[0]
    row = constant(torch.zeros(out)) if layer.layout.unused else to.of_slot(layer.output_table)
    shape = ops.shape_of(x)
    rows = ops.slice(shape, *(ops.constant(np.array([value], np.int64)) for value in (0, -1, 1)))
    return ops.broadcast(row, ops.concat([rows, ops.constant(np.array([out], np.int64))], 0))


@dataclass(eq=False)
class Emission:
    """One layer on its way into a graph."""

    operands: Operands
    to: Conversion
    name: str

    def __post_init__(self) -> None:
        given = self.operands
        self.integers = in_integers(given) is None
        self.channels = given.weight.shape[1]
        self.dims = 0 if given.window is None else len(given.window.stride)
        self.kernel = given.weight.shape[2:]
        self.border = self.border_values()

    def along(self, vector: Tensor) -> Tensor:
        """``[..., channels]`` in the shape in which it meets inputs or outputs."""
        return vector.reshape(*vector.shape, *[1] * self.dims)

    def product(self, x: Node) -> Node:
        """From the input as floats to the output."""
        found = None
        if self.integers and _found_at_run_time(self.operands):
            quantized, found = self.found_codes(x)
            scale = zero = None
        else:
            quantized, scale, zero = self.quantized_input(x)
        weight = self.weight()
        out = self.multiplied(quantized, self.matrix(weight, scale))
        (out if hasattr(out, "set_friendly_name") else out.get_node()).set_friendly_name(self.name)
        if found is not None:
            out = ops.multiply(out, found)
        if scale is not None and len(scale) > 1:
            out = ops.multiply(out, self.to.of_slot(self.along(scale)))
        bias = self.bias(weight, scale, zero)
        out = out if bias is None else ops.add(out, self.to.of_slot(self.along(bias)))
        return out if self.border is None else ops.add(out, self.of_border(x))

    # --- the input ----------------------------------------------------------------------------------------------------------------

    def quantized_input(self, x: Node) -> tuple[Node, Tensor | None, Tensor | None]:
        """The input as the product takes it, and its scale and zero point ``[slots, 1]`` if it is in units of codes."""
        numbers = self.operands.input
        x = self.padded(x) if self.pads_first else x
        if numbers is None:
            return self.rewritten_input(x), None, None
        if isinstance(numbers.format, Int) and numbers.rule is None and numbers.granularity.kind == "tensor":
            return self.shared(x), numbers.scale, numbers.zero_point if self.integers else None
        return self.levelled(self.rewritten_input(x), numbers), None, None

    def found_codes(self, x: Node) -> tuple[Node, Node]:
        """Codes of the input as floats, and the scale of every token, ``[..., 1]``, or of every sample, ``[N, 1, ...]``.

        Values are divided by their scale first: what is rounded then has one constant range, which the plugin makes bytes of.
        """
        numbers = self.operands.input
        assert numbers is not None
        x = self.rewritten_input(self.padded(x) if self.pads_first else x)
        scale, fmt = self.found_scale(x, numbers), numbers.format
        unit, wide = ops.divide(x, scale), (-128.0, 127.0)
        ends = [ops.constant(np.float32(end)) for end in wide * 2]
        return ops.fake_quantize(unit if (fmt.low, fmt.high) == wide else ops.clamp(unit, fmt.low, fmt.high), *ends, LEVELS), scale

    def border_values(self) -> Tensor | None:
        """What the border of a convolution would hold, ``[channels]``, if its product adds it as a bias; else None.

        Only for scales that are found in the forward: those of a step would need such a bias for every step.
        """
        given = self.operands
        if not (self.integers and _found_at_run_time(given) and given.shift is not None and keeps_sizes(given.window, self.kernel)):
            return None
        return zeros_become(given)

    def of_border(self, x: Node) -> Node:
        """What the border adds to every output, ``[out, *sizes]``."""
        assert self.border is not None
        weight = self.operands.weight.dequantize().reshape(self.operands.weight.shape)
        return by_position(added_by(self.border, weight), self.kernel, x)

    @property
    def pads_first(self) -> bool:
        """Whether zeros around the input have other codes than zero, so that it must be padded before it is rewritten."""
        numbers = self.operands.input
        shifted = self.operands.shift is not None or (self.integers and numbers is not None and numbers.zero_point is not None)
        return shifted and self.border is None

    @property
    def pads(self) -> tuple[list[int], list[int]]:
        """Zeros before and after, axis by axis."""
        window = self.operands.window
        padding = () if window is None else window.padding or (0,) * (2 * self.dims)
        return list(padding[-2::-2]), list(padding[::-2])

    def padded(self, x: Node) -> Node:
        """With a border of zeros, before they are shifted."""
        before, after = self.pads
        if not any(before + after):
            return x
        widths = [ops.constant(np.array([0, 0, *widths], np.int64)) for widths in (before, after)]
        return ops.pad(x, *widths, "constant", ops.constant(np.float32(0)))

    def shared(self, x: Node) -> Node:
        """:meth:`codes`, or those of a layer that read the same tensor with the same numbers."""
        numbers = self.operands.input
        assert numbers is not None
        given, mix = self.operands, self.operands.mix
        vectors = (given.shift, given.scale, numbers.scale, numbers.zero_point, *(one.vector for one in mix))
        digest = tuple(None if one is None else one.detach().float().numpy().tobytes() for one in vectors)
        source = x.get_node().get_name() if hasattr(x, "get_node") else x.get_name()
        index, names = x.get_index() if hasattr(x, "get_index") else 0, tuple(one.name for one in mix)
        key = (source, index, self.integers, given.rotate, names, numbers.format, digest)
        if key not in self.to.rounded:
            self.to.rounded[key] = self.codes(self.turned(x), numbers)
        return self.to.rounded[key]

    def codes(self, x: Node, numbers: InputQuant) -> Node:
        """Codes of a rotated input, as floats: ``round((x - shift) / scale / input_scale + zero_point)``."""
        multiply, add = self.folded(numbers)
        low, high = numbers.format.low, numbers.format.high
        wide = (0.0, 255.0) if numbers.zero_point is not None else (-128.0, 127.0)
        if self.integers and len(multiply) == 1 and (low, high) == wide:  # range of a channel: rewriting costs nothing
            ends = [constant(self.along((end - add[0]) / multiply[0])[None]) for end in wide]
            return ops.fake_quantize(x, *ends, *(ops.constant(np.float32(end)) for end in wide), LEVELS)
        unit = ops.multiply(x, self.to.of_slot(self.along(multiply)))
        unit = ops.add(unit, self.to.of_slot(self.along(add))) if bool(add.any()) else unit
        if not self.integers:
            rounded = ops.round(ops.clamp(unit, low, high), "half_to_even")
            return rounded if numbers.zero_point is None else ops.subtract(rounded, self.to.of_slot(self.along(numbers.zero_point.float())))
        ends = [ops.constant(np.float32(end)) for end in wide * 2]
        return ops.fake_quantize(unit if (low, high) == wide else ops.clamp(unit, low, high), *ends, LEVELS)

    def folded(self, numbers: InputQuant) -> tuple[Tensor, Tensor]:
        """``x * multiply + add`` in units of codes, ``[slots, channels or 1]`` each."""
        given = self.operands
        assert numbers.scale is not None
        scale = torch.ones(1) if given.scale is None else given.scale.detach().float()
        shift = torch.zeros(1) if given.shift is None else given.shift.detach().float()
        multiply = 1 / (scale * numbers.scale.float())
        zero = torch.zeros(1) if numbers.zero_point is None else numbers.zero_point.float()
        return multiply, zero - shift * multiply

    def rewritten_input(self, x: Node) -> Node:
        """``(rotate(mix(x)) - shift) / scale``."""
        x = self.turned(x)
        x = x if self.operands.shift is None else ops.subtract(x, constant(self.along(self.operands.shift)))
        return x if self.operands.scale is None else ops.divide(x, constant(self.along(self.operands.scale)))

    def turned(self, x: Node) -> Node:
        """``rotate(mix(x))``."""
        for mix in self.operands.mix:
            x = self.mixed(x, mix)
        return self.rotated(x, block_size(self.channels)) if self.operands.rotate else x

    def mixed(self, x: Node, mix: Mix) -> Node:
        """One operation on the channels."""
        if isinstance(mix, Scaling):
            return ops.divide(x, constant(self.along(mix.scale)))
        if isinstance(mix, Permutation):
            axis = ops.constant(np.int64(1 if self.dims else -1))
            return ops.gather(x, ops.constant(mix.order.numpy().astype(np.int64)), axis)
        assert isinstance(mix, Rotation)
        return self.rotated(x, mix.block or block_size(self.channels))

    def rotated(self, x: Node, width: int) -> Node:
        """Channels rotated in blocks (:func:`reelquant.kernels.hadamard`): one product with a small matrix, or two."""
        if width == 1:
            return x
        if self.dims:
            order = [0, *range(2, self.dims + 2), 1]
            last = ops.transpose(x, ops.constant(np.array(order, np.int64)))
            back = ops.constant(np.argsort(order).astype(np.int64))
            return ops.transpose(_in_blocks(last, self.channels, width), back)
        return _in_blocks(x, self.channels, width)

    def levelled(self, x: Node, numbers: InputQuant) -> Node:
        """The input rounded to any format, as floats."""
        if numbers.rule is not None:
            return self.dynamic(x, numbers)
        if numbers.granularity.kind not in ("tensor", "channel"):
            raise UnsupportedError(
                f"OpenVINO graphs hold no input scales per {numbers.granularity}; use runtime='torch', or quantize inputs per tensor"
            )
        assert numbers.scale is not None
        scale = self.to.of_slot(self.along(numbers.scale))
        unit = ops.divide(x, scale)
        zero = None if numbers.zero_point is None else self.to.of_slot(self.along(numbers.zero_point))
        rounded = _to_levels(unit if zero is None else ops.add(unit, zero), numbers)
        return ops.multiply(rounded if zero is None else ops.subtract(rounded, zero), scale)

    def dynamic(self, x: Node, numbers: InputQuant) -> Node:
        """Rounded with a scale per token or sample that is found in the forward."""
        fmt = numbers.format
        if numbers.granularity.kind not in FOUND_AT_RUN_TIME or not _covers(numbers):
            raise UnsupportedError(
                f"OpenVINO graphs hold no dynamic {fmt.name} inputs per {numbers.granularity}; use runtime='torch', or static inputs"
            )
        scale = self.found_scale(x, numbers)
        return ops.multiply(ops.round(ops.clamp(ops.divide(x, scale), fmt.low, fmt.high), "half_to_even"), scale)

    def found_scale(self, x: Node, numbers: InputQuant) -> Node:
        """The smallest scale with which symmetric integers cover a token or sample; 1 where it is all zeros."""
        fmt, grain = numbers.format, numbers.granularity
        rank = _rank(x)
        axes = ops.constant(np.array([grain.axis] if grain.kind == "token" else [*range(1, rank)], np.int64))
        ends = [(ops.reduce_max, fmt.high), (ops.reduce_min, fmt.low)]
        scale = ops.maximum(*[ops.divide(end(x, axes, True), ops.constant(np.float32(level))) for end, level in ends])
        if self.border is not None:  # the layer's scale covers its border
            least = max(float(self.border.max()) / fmt.high, float(self.border.min()) / fmt.low)
            scale = ops.maximum(scale, ops.constant(np.float32(least)))
        return ops.select(ops.greater(scale, ops.constant(np.float32(0))), scale, ops.constant(np.float32(1)))

    # --- the weight ---------------------------------------------------------------------------------------------------------------

    def weight(self) -> Weight | None:
        """Codes with a scale per row, or None if the weight has no such form."""
        weight = self.operands.weight
        fmt, grain = weight.quantizer.format, weight.quantizer.granularity
        if not isinstance(fmt, Int) or not fmt.signed:
            return None
        if grain.kind == "group":
            return Weight(*nibbles.widened(weight)) if self.integers else None
        scale = weight.quantizer.scale.float().reshape(-1)
        return Weight(int8.signed(weight), scale.expand(weight.shape[0]))

    def matrix(self, weight: Weight | None, scale: Tensor | None) -> Node:
        """The weight as the product takes it: times the input's scale, if that is one for all steps."""
        once = float(scale) if scale is not None and len(scale) == 1 else 1.0
        shape = self.operands.weight.shape
        if weight is None:
            return self.grouped(once) if self.stays_grouped else constant(self.operands.weight.dequantize() * once)
        if not self.integers and not self.stays_coded:
            return constant(self.operands.weight.dequantize() * once)
        codes = ops.constant(np.ascontiguousarray(weight.codes.reshape(shape).numpy()))
        return ops.multiply(ops.convert(codes, np.float32), constant(weight.scale.reshape(-1, *[1] * (len(shape) - 1)) * once))

    @property
    def stays_coded(self) -> bool:
        """Whether a float product reads codes: large weights of linear layers whose recipe saves memory and nothing else."""
        return self.operands.input is None and not self.dims and math.prod(self.operands.weight.shape) > SMALL

    @property
    def stays_grouped(self) -> bool:
        """Whether these are 4-bit codes with a scale per group that the plugin multiplies by."""
        weight = self.operands.weight
        fmt, size = weight.quantizer.format, weight.quantizer.granularity.size
        fits = isinstance(fmt, Int) and fmt.signed and fmt.bits == 4 and weight.quantizer.granularity.kind == "group"
        return fits and self.stays_coded and weight.width % size == 0 and size % 2 == 0

    def grouped(self, once: float) -> Node:
        """4-bit codes that stay four bits, with a scale per group."""
        weight = self.operands.weight
        size = weight.quantizer.granularity.size
        shape = [len(weight.codes), weight.width // size, size]
        codes = ops.constant(openvino.Tensor(np.ascontiguousarray(weight.codes.numpy()), shape, openvino.Type.u4))
        centred = ops.subtract(ops.convert(codes, np.float32), ops.constant(np.float32(8)))
        scaled = ops.multiply(centred, constant(weight.quantizer.scale.float().reshape(*shape[:2], 1) * once))
        return ops.reshape(scaled, ops.constant(np.array([shape[0], weight.width], np.int64)), False)

    def bias(self, weight: Weight | None, scale: Tensor | None, zero: Tensor | None) -> Tensor | None:
        """``[slots or 1, out]``: the layer's bias, less what the zero points of its input add to every output."""
        bias = None if self.operands.bias is None else self.operands.bias.detach().float()[None]
        if zero is None or scale is None:
            return bias
        if weight is None:
            sums = self.operands.weight.dequantize().flatten(1).double().sum(1)
        else:
            sums = weight.codes.flatten(1).double().sum(1) * weight.scale.double()
        added = (zero.double() * scale.double() * sums).float()
        return -added if bias is None else bias - added

    def multiplied(self, x: Node, weight: Node) -> Node:
        """``x @ weight^T``, or the convolution."""
        window = self.operands.window
        if window is None:
            return ops.matmul(x, weight, False, True)
        before, after = [[0] * self.dims] * 2 if self.pads_first else self.pads
        return ops.convolution(x, weight, list(window.stride), before, after, list(window.dilation))


def _rank(x: Node) -> int:
    """Number of axes of an output."""
    return len(x.get_partial_shape()) if hasattr(x, "get_partial_shape") else len(x.get_output_partial_shape(0))


def _in_blocks(x: Node, channels: int, width: int) -> Node:
    """Rotate the last axis in blocks."""
    rank = _rank(x)
    inner = width if width <= WIDEST else 1 << (width.bit_length() // 2)
    sizes = [channels // width, width // inner, inner] if width > inner else [channels // inner, inner]
    apart = ops.reshape(x, ops.constant(np.array([0] * (rank - 1) + sizes, np.int64)), True)
    turned = ops.matmul(apart, constant(hadamard(torch.eye(inner))), False, False)
    if width > inner:
        turned = ops.matmul(constant(hadamard(torch.eye(width // inner))), turned, False, False)
    return ops.reshape(turned, ops.constant(np.array([0] * (rank - 1) + [channels], np.int64)), True)


def _to_levels(unit: Node, numbers: InputQuant) -> Node:
    """The nearest number of a format, in units."""
    if isinstance(numbers.format, Int):
        return ops.round(ops.clamp(unit, numbers.format.low, numbers.format.high), "half_to_even")
    levels = numbers.format.levels().float()
    middles = (levels[1:] + levels[:-1]) / 2
    index = ops.bucketize(unit, constant(middles), "i64", True)
    return ops.gather(constant(levels), index, ops.constant(np.int64(0)))
