"""Compiled graphs of a denoiser by the form of its calls, and the ``forward`` that answers from them.

A graph holds for one arrangement of arguments, their shapes and dtypes, and all arguments that are not tensors; a call of another form
compiles another one, and the least recently used goes. It holds copies of the numbers of the model, so it is compiled again if these move
or change. Steps with bits of their own are computed in torch.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import openvino
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from reelquant._errors import UnsupportedError
from reelquant._torch_state import version_of
from reelquant.clock import NAME, Moment
from reelquant.graphs.convert import in_integers
from reelquant.graphs.parts import SubgraphCache, split_invariant, step_invariant
from reelquant.graphs.refusals import refuse_call, refuse_model
from reelquant.graphs.trace import Traced, as_number, last_line, trace
from reelquant.kernels import REFERENCE, Kernel, current_backend
from reelquant.nn import QuantLayer, quantized_layers
from reelquant.reuse.answer import Answer

logger = logging.getLogger(__name__)
GRAPHS = "_reelquant_graphs"
KEPT = 4  # graphs of one model
FAR = 0.15  # relative distance of a graph's first answer from that of the layers: codes that turn make 1 to 6 % in one call
OPTIONS: dict[str, Any] = {
    "NUM_STREAMS": 1,
    "ENABLE_CPU_PINNING": False,
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # otherwise the plugin rounds float inputs of layers with 8- or 4-bit weights
}
INTEGERS = Kernel("openvino int8", REFERENCE.takes, in_integers, REFERENCE.prepare)
FLOATS = Kernel("openvino float products", REFERENCE.takes, REFERENCE.refuses, REFERENCE.prepare, low_bit=False)


@functools.cache
def core() -> Any:
    """The one of this process; making another takes a while."""
    return openvino.Core()


@dataclass(eq=False)
class Compiled:
    """A graph that is ready to run, in one piece or in two.

    Attributes:
        main: what is computed in every step.
        order: which of the step and the tensors of a call it takes, before the outputs of ``once``.
        once: what depends on step-invariant tensors only, or None.
        stays: which of the step and the tensors of a call are step-invariant.
        traced: how answers are arranged.
    """

    main: Any
    order: list[int]
    once: Any
    stays: list[bool]
    traced: Traced
    requests: threading.local = field(default_factory=threading.local)

    def __call__(self, slot: int, leaves: Sequence[Any]) -> Any:
        """The answer at a step; every thread has requests of its own."""
        mine: Any = self.requests
        if not hasattr(mine, "main"):
            mine.main, mine.cache = self.main.create_infer_request(), SubgraphCache()
        tensors = [torch.tensor(slot), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        before = (
            []
            if self.once is None
            else mine.cache([one for one, last in zip(tensors, self.stays, strict=True) if last], lambda: self._once(tensors))
        )
        given = [readable(tensors[index]) for index in self.order]  # until the request is done: their memory is read in place
        answer(mine.main, [*map(shared, given), *before])
        found = [torch.from_numpy(mine.main.get_output_tensor(index).data.copy()) for index in range(len(self.traced.dtypes))]
        if any(bool(tensor.isnan().any()) for tensor in tensors if tensor.is_floating_point()):  # codes cannot hold it, and it must show
            found = [torch.full_like(one, torch.nan) for one in found]
        return tree_unflatten([one.to(dtype) for one, dtype in zip(found, self.traced.dtypes, strict=True)], self.traced.answer)

    def _once(self, tensors: Sequence[Tensor]) -> list[Any]:
        request = self.once.create_infer_request()
        answer(request, [shared(readable(one)) for one, last in zip(tensors, self.stays, strict=True) if last])
        return [_copied(request.get_output_tensor(index)) for index in range(len(request.model_outputs))]


def shared(tensor: Tensor) -> Any:
    """The same memory, for OpenVINO."""
    return openvino.Tensor(tensor.numpy(), shared_memory=True)


def answer(request: Any, given: Sequence[Any]) -> None:
    """Run a request on these tensors."""
    for index, tensor in enumerate(given):
        request.set_input_tensor(index, tensor)
    request.infer()


def _copied(tensor: Any) -> Any:
    new = openvino.Tensor(tensor.element_type, tensor.shape)
    tensor.copy_to(new)
    return new


def readable(tensor: Tensor) -> Tensor:
    """What numpy can look at."""
    tensor = tensor.detach()
    return (tensor if tensor.dtype not in (torch.bfloat16, torch.float16) else tensor.float()).contiguous()


@dataclass(eq=False)
class Graphs:
    """The graphs of one model, least recently used first.

    Attributes:
        layers: its quantized layers by number.
        numbers: tensors that graphs hold copies of, but for the codes.
        stamp: where those were and how often they had been written to when the graphs were made.
    """

    layers: dict[int, QuantLayer]
    numbers: list[Tensor]
    tables: bool
    stamp: tuple[Any, ...] = ()
    kept: OrderedDict[tuple[Any, ...], Compiled] = field(default_factory=OrderedDict)
    lock: Any = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, model: nn.Module) -> Graphs:
        """None yet."""
        layers = {layer.handle: layer for layer in quantized_layers(model).values()}
        held = {id(layer.weight) for layer in layers.values()}  # a kernel may take a weight over, for protected steps
        clock = getattr(model, NAME, None)
        ticking = {id(one) for one in clock.buffers()} if clock is not None else set()
        numbers = [one for one in (*model.parameters(), *model.buffers()) if id(one) not in held | ticking]
        return cls(layers, numbers, any(layer.layout.table for layer in layers.values()))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model makes graphs of its own, when it runs."""
        return

    def of_call(self, model: nn.Module, args: Any, kwargs: Any, exact: bool) -> tuple[Compiled, list[Any], bool]:
        """The graph for a call of this form, compiled if there is none, the leaves of its arguments, and whether it was compiled now."""
        leaves, tree = tree_flatten((args, kwargs))
        stamp = tuple((one.data_ptr(), version_of(one)) for one in self.numbers)
        form = (tree, exact, torch.get_num_threads(), *map(_form, leaves))
        with self.lock:
            if stamp != self.stamp:
                self.kept.clear()
                self.stamp = stamp
            if fresh := form not in self.kept:
                traced = trace(model, leaves, tree, exact)
                self.kept[form] = self._compiled(model, traced, [False, *step_invariant(model, args, kwargs)])
                while len(self.kept) > KEPT:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(form)
            return self.kept[form], leaves, fresh

    def let_go(self) -> None:
        """Forget all graphs."""
        with self.lock:
            self.kept.clear()

    def _compiled(self, model: nn.Module, traced: Traced, stays: list[bool]) -> Compiled:
        start, name = time.perf_counter(), type(model).__name__
        logger.info("compiling an OpenVINO graph of %s for tensors of %s", name, [list(one.shape) for one in traced.graph.inputs[1:]])
        options = OPTIONS | {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision(model)}
        first, main, order = split_invariant(traced.graph, stays) or (None, traced.graph, list(range(len(stays))))
        try:
            made = [None if graph is None else core().compile_model(graph, "CPU", options) for graph in (first, main)]
        except RuntimeError as error:
            raise UnsupportedError(f"OpenVINO does not compile {name}: {last_line(error)}; use runtime='torch'") from error
        told = tell([graph for graph in made if graph is not None], self.layers)
        logger.info("compiled in %.1f s; %d of %d layers multiply integers", time.perf_counter() - start, told, len(self.layers))
        return Compiled(made[1], order, made[0], stays, replace(traced, graph=None))


def _form(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def precision(model: nn.Module) -> str:
    """In which floats the graph computes what is not integer: bfloat16 for models of it, on processors that have it."""
    kinds = [one.dtype for one in model.parameters() if one.is_floating_point()]
    able = "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bf16" if able and torch.bfloat16 in kinds else "f32"


def tell(made: Sequence[Any], layers: dict[int, QuantLayer]) -> int:
    """Let layers say what really computes them; how many multiply integers."""
    found: dict[int, str] = {}
    for node in (node for graph in made for node in graph.get_runtime_model().get_ops()):
        facts = node.get_rt_info()
        for name in facts["originalLayersNames"].astype(str).split(",") if "originalLayersNames" in facts else ():
            if (number := as_number(name)) is not None and facts["primitiveType"].astype(str) != "unknown":
                found[number] = facts["primitiveType"].astype(str)
    for number, primitive in found.items():
        if number in layers:
            layers[number].runtime_kernel = computed_by(layers[number], primitive)
    return sum(layer.runtime_kernel is not None and layer.runtime_kernel[0].name == INTEGERS.name for layer in layers.values())


def computed_by(layer: QuantLayer, primitive: str | None = None) -> tuple[Kernel, dict[str, str]]:
    """What computes a layer in a graph; before there is one, what is expected to."""
    reason = in_integers(layer.operands)
    if reason is None and primitive is not None and not primitive.lower().endswith("i8"):
        reason = f"OpenVINO chose {primitive}"
    return (INTEGERS, {}) if reason is None else (FLOATS, {INTEGERS.name: reason})


def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the model answers, from a graph."""
    refuse_call(model, args, kwargs)
    clock = getattr(model, NAME, None)
    now = clock.now() if clock is not None else Moment()
    graphs = vars(model)[GRAPHS]
    if graphs is None:
        graphs = start(model)
    if (clock is not None and not clock.reads_stored) or _oracle(graphs):
        return type(model).forward(model, *args, **kwargs)
    if graphs.tables and not now.exact:
        clock.fall_back()
    compiled, leaves, fresh = graphs.of_call(model, args, kwargs, now.exact and graphs.tables)
    answered = compiled(int(now.slot), leaves)
    if fresh:
        with torch.no_grad():
            _check(model, graphs, answered, type(model).forward(model, *args, **kwargs))
    return answered


def _check(model: nn.Module, graphs: Graphs, answered: Any, layers: Any) -> None:
    """Hold the first answer of a graph against that of the layers; their weights are given back.

    Raises:
        UnsupportedError: if rounding alone does not explain the difference.
    """
    for layer in graphs.layers.values():
        layer.release()
    found, expected = ([leaf.float() for leaf in tree_leaves(one) if isinstance(leaf, Tensor)] for one in (answered, layers))
    if (shapes := [list(one.shape) for one in found]) != (wanted := [list(one.shape) for one in expected]):
        graphs.let_go()
        raise UnsupportedError(f"the OpenVINO graph of {type(model).__name__} answers {shapes} instead of {wanted}; use runtime='torch'")
    size = sum(float(one.square().sum()) for one in expected)
    away = (sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True)) / max(size, 1e-30)) ** 0.5
    if math.isfinite(size) and not away <= FAR:
        graphs.let_go()
        told = f"{away:.0%} away from its layers (rms), and rounding explains {FAR:.0%} at most"
        told = told if math.isfinite(away) else "NaN or infinities where its layers do not"
        raise UnsupportedError(f"the OpenVINO graph of {type(model).__name__} answers {told}; use runtime='torch'")


def _oracle(graphs: Graphs) -> bool:
    """Whether the reference was asked for, which is torch's."""
    return current_backend() == "reference" or any(layer.kernels == "reference" for layer in graphs.layers.values())


def start(model: nn.Module) -> Graphs:
    """Let a model answer from graphs; those that it had go."""
    refuse_model(model)
    graphs = Graphs.of(model)
    object.__setattr__(model, GRAPHS, graphs)
    _place(model, MethodType(_like(type(model)), model))  # its class, which checkpoints name, stays what it is
    for layer in graphs.layers.values():
        layer.runtime_kernel = computed_by(layer)
    return graphs


def _place(model: nn.Module, answers: Any) -> None:
    """Let a model's forward ask this, or its class; a reuse of whole answers stays before it."""
    if isinstance(before := vars(model).get("forward"), Answer):
        before.before = answers
    elif answers is None:
        vars(model).pop("forward", None)
    else:
        object.__setattr__(model, "forward", answers)


def stop(model: nn.Module) -> None:
    """Undo :func:`start`."""
    if vars(model).pop(GRAPHS, None) is None and "forward" not in vars(model):
        return
    _place(model, None)
    for layer in quantized_layers(model).values():
        layer.runtime_kernel = None


@functools.cache
def _like(kind: type[nn.Module]) -> Any:
    """:func:`forward` with the signature of a class: pipelines look at it."""

    @functools.wraps(kind.forward)
    def answered(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return answered
