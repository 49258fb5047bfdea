"""Split off the subgraph that depends only on step-invariant inputs (the prompt); it runs once per clip."""

from __future__ import annotations

import inspect
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openvino
import openvino.opset13 as ops
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from reelquant._torch_state import version_of
from reelquant.discover.arguments import kind_of
from reelquant.nn.output_cache import PROMPTS

HELD = 64 << 20  # bytes between the two graphs above which everything is computed in every step: little is gained by what is so wide
CHANGING = ("latent", "timestep")


def step_invariant(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> list[bool]:
    """For every tensor of a call, in order: whether it usually stays the same over the steps of a clip."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    given = [*zip(names, args, strict=False), *kwargs.items()]
    flags = [(kind_of((name,)) not in CHANGING, tree_leaves(value)) for name, value in given]
    return [stays for stays, leaves in flags for leaf in leaves if isinstance(leaf, Tensor)]


def split_invariant(graph: Any, stays: Sequence[bool]) -> tuple[Any, Any, list[int]] | None:
    """Split a graph into the part that depends only on step-invariant inputs, and the rest.

    Args:
        graph: to be split; must not be used afterwards.
        stays: for every input, whether it is step-invariant.

    Returns:
        The invariant graph, with the invariant inputs; the rest, whose inputs are those of ``order`` and then the outputs of the first;
        the order. None if there is nothing to compute once, if it takes too much memory, or if a size at the border is unknown.
    """
    _write_shapes(graph)
    parameters = graph.get_parameters()
    depends: dict[str, set[int]] = {one.get_name(): {index} for index, one in enumerate(parameters)}
    for node in graph.get_ordered_ops():
        sources = [value.get_source_output().get_node().get_name() for value in node.inputs()]
        depends.setdefault(node.get_name(), set().union(*(depends[name] for name in sources)))

    def early(node: Any) -> bool:
        needed = depends[node.get_name()]
        return bool(needed) and all(stays[index] for index in needed) and node.get_type_name() not in ("Parameter", "Result")

    def readers(output: Any) -> list[Any]:
        """Inputs of nodes that belong to the rest; nodes that conversion left over read outputs, too."""
        inside = [target for target in output.get_target_inputs() if target.get_node().get_name() in depends]
        return [target for target in inside if not early(target.get_node())]

    border = [
        (output, late)
        for node in graph.get_ordered_ops()
        for output in (node.outputs() if early(node) else ())
        if (late := readers(output))
    ]
    if any(output.get_partial_shape().is_dynamic for output, _ in border):
        return None
    size = sum(math.prod(output.get_shape()) * output.get_element_type().size for output, _ in border)
    if not border or size > HELD:
        return None
    model: Any = openvino.Model  # its class has other types than its parts
    given = []
    for output, late in border:
        new = ops.parameter(output.get_shape(), output.get_element_type())
        for target in late:
            target.replace_source_output(new.output(0))
        given.append(new)
    first = model([ops.result(output) for output, _ in border], [one for one, last in zip(parameters, stays, strict=True) if last])
    order = [index for index, one in enumerate(parameters) if not stays[index] or readers(one.output(0))]
    return first.clone(), model(graph.get_results(), [*(parameters[index] for index in order), *given]), order


def _write_shapes(graph: Any) -> None:
    """Let known shapes be constants: sizes that came from the other graph as numbers would leave this one without shapes."""
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "ShapeOf" and node.input_value(0).get_partial_shape().is_static:
            shape = ops.constant(np.array(list(node.input_value(0).get_shape())), dtype=node.get_output_element_type(0))
            for target in node.output(0).get_target_inputs():
                target.replace_source_output(shape.output(0))


class SubgraphCache:
    """Outputs of the invariant graph for the last prompts. The key is the tensor objects and their version counters."""

    def __init__(self) -> None:
        self.entries: OrderedDict[tuple[Any, ...], tuple[list[Any], list[Any]]] = OrderedDict()

    def __call__(self, tensors: Sequence[Tensor], compute: Callable[[], list[Any]]) -> list[Any]:
        """The cached outputs, or new ones."""
        if any(tensor.is_inference() for tensor in tensors):  # they have no version counter
            return compute()
        key = tuple((id(tensor), version_of(tensor)) for tensor in tensors)
        entry = self.entries.get(key)
        if entry is None or any(cached() is not tensor for cached, tensor in zip(entry[0], tensors, strict=True)):
            self.entries[key] = entry = [weakref.ref(tensor) for tensor in tensors], compute()
            while len(self.entries) > PROMPTS:
                self.entries.popitem(last=False)
        return entry[1]
