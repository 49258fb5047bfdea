"""A denoiser as one graph: traced once by torch with its quantized layers as opaque operators, which then become operators of OpenVINO."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino
import torch
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch import ConversionExtension
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from reelquant._errors import UnsupportedError
from reelquant.graphs.convert import NAMED, Conversion, emit
from reelquant.graphs.rope_rewrite import FuseInterleave
from reelquant.graphs.sdpa_workaround import fix_ambiguous_sdpa
from reelquant.graphs.split_products import split_products
from reelquant.nn import QuantLayer
from reelquant.nn.around.graph import by_handle, opaque_tracing

_one_at_a_time = threading.Lock()  # torch's tracer has state of its own


class Filling(TorchFunctionMode):
    """Fills masks with 0 and 1 where a model writes False and True: torch's tracer has no operator for those."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.masked_fill, torch.Tensor.masked_fill_):
            args = tuple(int(one) if isinstance(one, bool) else one for one in args)
            kwargs = {name: int(one) if isinstance(one, bool) else one for name, one in kwargs.items()}
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Traced:
    """A graph and what its answer looks like.

    Attributes:
        graph: inputs are the step and the tensors of a call, in order.
        answer: how its outputs are arranged.
        dtypes: of the outputs in torch.
    """

    graph: Any
    answer: TreeSpec
    dtypes: tuple[torch.dtype, ...]


class Flat(nn.Module):
    """A denoiser that is called with the step and a row of tensors, and answers with a row of tensors.

    Attributes:
        leaves: arguments, dtypes in the place of tensors.
        answer: how the last answer was arranged, and its dtypes.
    """

    def __init__(self, model: nn.Module, leaves: Sequence[Any], tree: TreeSpec) -> None:
        super().__init__()
        self.model, self.tree = model, tree
        self.leaves = [leaf.dtype if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.tensors = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.answer: tuple[TreeSpec, tuple[torch.dtype, ...]] | None = None

    def forward(self, slot: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.leaves)
        for index, tensor in zip(self.tensors, tensors, strict=True):
            leaves[index] = tensor.to(self.leaves[index])
        args, kwargs = tree_unflatten(leaves, self.tree)
        with opaque_tracing(slot), FuseInterleave(), Filling():
            found, answer = tree_flatten(type(self.model).forward(self.model, *args, **kwargs))
        if not all(isinstance(one, Tensor) for one in found):
            kinds = sorted({type(one).__name__ for one in found})
            raise UnsupportedError(f"{type(self.model).__name__} answers with {', '.join(kinds)}; OpenVINO graphs answer with tensors only")
        self.answer = answer, tuple(one.dtype for one in found)
        return tuple(map(widened, found))


def widened(tensor: Tensor) -> Tensor:
    """Graphs are called with float32 in the place of shorter floats, which numpy does not know."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def trace(model: nn.Module, leaves: Sequence[Any], tree: TreeSpec, exact: bool) -> Traced:
    """The graph of one call.

    Args:
        model: a denoiser with quantized layers.
        leaves, tree: its arguments; shapes of tensors hold for every later call, and other leaves are a part of the graph.
        exact: whether layers with a table answer from it.

    Raises:
        UnsupportedError: if torch or OpenVINO cannot read the model.
    """
    flat = Flat(model, leaves, tree)
    tensors = [widened(leaf.detach()) for leaf in leaves if isinstance(leaf, Tensor)]
    inputs = (torch.zeros((), dtype=torch.int64), *tensors)
    conversions: list[Conversion] = []

    def layer(context: Any) -> list[Any]:
        if not conversions:
            conversions.append(Conversion(context.get_input(1), exact))
        return emitted(context, conversions[0])

    with _one_at_a_time, torch.no_grad(), still(flat), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: that shapes are constants is what is wanted
        try:
            graph = converted(flat, inputs, ConversionExtension("reelquant::opaque", layer))
        except UnsupportedError:
            raise
        except Exception as error:
            raise UnsupportedError(
                f"{type(model).__name__} cannot be made an OpenVINO graph: {last_line(error)}; use runtime='torch'"
            ) from error
    graph.reshape({index: list(tensor.shape) for index, tensor in enumerate(inputs)})
    fix_ambiguous_sdpa(graph)
    split_products(graph)
    assert flat.answer is not None
    return Traced(graph, *flat.answer)


def converted(flat: nn.Module, inputs: tuple[Tensor, ...], extension: Any) -> Any:
    """What ``openvino.convert_model`` gives, without the passes that compiling makes again: a function is traced, its numbers constants."""
    traced = torch.jit.trace(lambda *tensors: flat(*tensors), inputs, check_trace=False, strict=False)
    frontend = FrontEndManager().load_by_framework("pytorch")
    frontend.add_extension(extension)
    decoder = TorchScriptPythonDecoder(traced, skip_freeze=True)  # has to live until its graph is converted
    names = [one.debugName() for one in traced.graph.inputs()]
    return with_inputs(frontend.convert(frontend.load(decoder)), dict(zip(names, inputs, strict=True)))


def with_inputs(graph: Any, inputs: dict[str, Tensor]) -> Any:
    """A graph with all inputs of these names, in order: conversion drops those that nothing reads."""
    found = {name: one for one in graph.get_parameters() for name in one.output(0).get_names()}
    unread = {name: openvino.opset13.parameter(list(one.shape), openvino.Type(one.numpy().dtype)) for name, one in inputs.items()}
    model: Any = openvino.Model  # its class has other types than its parts
    return model(graph.get_results(), list((unread | {name: found[name] for name in inputs if name in found}).values()))


def last_line(error: Exception) -> str:
    """Where OpenVINO and torch say what is wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def emitted(context: Any, to: Conversion) -> list[Any]:
    """The operators of one layer, the last of which bears its number."""
    layer: QuantLayer = by_handle(int(context.get_values_from_const_input(2)))
    x = context.get_input(0)
    kind = x.get_element_type()
    out = emit(layer, openvino.opset13.convert(x, np.float32) if kind != openvino.Type.f32 else x, to)
    out = openvino.opset13.convert(out, kind) if kind != openvino.Type.f32 else out
    return list(out.outputs())


@contextmanager
def still(flat: nn.Module) -> Iterator[None]:
    """Not in training mode, and no parameter wants a gradient; all get back what they had."""
    modes = {module: module.training for module in flat.modules()}
    wanting = [one for one in flat.parameters() if one.requires_grad]
    flat.eval()
    for one in wanting:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for one in wanting:
            one.requires_grad_(True)


def as_number(name: str) -> int | None:
    """The number of the layer that an operator of this name belongs to; transformations add words to names."""
    number = name.removeprefix(NAMED).split("/")[0].split(".")[0]
    return int(number) if name.startswith(NAMED) and number.isdecimal() else None
