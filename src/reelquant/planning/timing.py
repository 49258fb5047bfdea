"""How long pieces of work take on this machine: measured once at their true shapes, kept in the user's cache.

Long inputs are cut to a few megabytes along one axis, and the time is scaled with what was cut: the rest of a shape stays as it is. A time
is the median of a few repetitions; with one thread it is processor time, which other processes disturb less.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelquant._cache import cache_folder
from reelquant._errors import UnsupportedError
from reelquant._progress import Progress, Silent
from reelquant.evidence.machine import machine, versions
from reelquant.kernels import attention as ours
from reelquant.planning.layers import float_layer, quantized_layer
from reelquant.planning.trace import AttentionCall, LayerCall, OperatorCall, Shape
from reelquant.stages import Specs

ROWS = 1024  # of the input of a linear layer, at most
PLACES = 4096  # of the output of a convolution, about
QUERIES, SCORES = 1024, 1 << 26  # of attention, at most; stock attention takes smaller blocks below 768 queries
NUMBERS = 1 << 24  # of a tensor of another operator
REPEATS, LEAST = 3, 0.005  # how often, and seconds that a sample takes at least

Work = Callable[[], object]


class Timings:
    """Seconds of pieces of work on one device, by what they are.

    Attributes:
        device: where the work is done.
        file: where times are kept.
        seconds: those that are known.
    """

    def __init__(self, device: str = "cpu", folder: Path | None = None) -> None:
        self.device = device
        about = [machine(), versions(), device, torch.get_num_threads()]
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.file = (folder or cache_folder() / "timings") / f"{name}.json"
        self.seconds: dict[str, float] = {}
        with suppress(OSError, ValueError):
            self.seconds = {str(key): float(value) for key, value in json.loads(self.file.read_text()).items()}

    def measure(self, wanted: Mapping[str, Callable[[], tuple[Work, float]]], progress: Progress | None = None) -> None:
        """Time what is not known yet.

        Args:
            wanted: by key, what makes the work, and how many times as much the whole of it is.
            progress: hears how far it is.
        """
        new = {key: make for key, make in wanted.items() if key not in self.seconds}
        heard = progress or Silent()
        if not new:
            return
        heard.phase("kernels", len(new))
        try:
            for key, make in new.items():
                work, factor = make()
                self.seconds[key] = factor * seconds_of(work, self.device)
                heard.advance()
        finally:
            self._keep()

    def _keep(self) -> None:
        """Write the file, complete or not at all; a cache that cannot be written is done without."""
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            beside = self.file.with_name(f"{self.file.name}.{os.getpid()}")
            beside.write_text(json.dumps(self.seconds))
            os.replace(beside, self.file)


def here(device: str) -> bool:
    """Whether this machine has a device.

    Raises:
        UnsupportedError: if torch knows no device of this name.
    """
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise UnsupportedError(f"torch knows no device '{device}'; write cpu, cuda or cuda:1") from None
    return kind.type == "cpu" or (kind.type == "cuda" and (kind.index or 0) < torch.cuda.device_count())


def seconds_of(work: Work, device: str = "cpu", repeats: int = REPEATS) -> float:
    """Seconds of a call: the median of some samples, after calls that compile, repack and fill caches."""
    clock = time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def sample(count: int) -> float:
        start = clock()
        for _ in range(count):
            work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return (clock() - start) / count

    with torch.no_grad():
        work()
        once = max(sample(1), 1e-7)
        count = max(1, round(LEAST / once))
        return statistics.median(sample(count) for _ in range(repeats))


# --- layers -----------------------------------------------------------------------------------------------------------


def layer_key(stock: nn.Module, specs: Specs | None, shape: Shape) -> str:
    """What decides on the time of a layer: geometry, numbers, input."""
    words = str(stock) if isinstance(stock, nn.Linear) else f"{stock} {tuple(stock.weight.shape)}"  # pyright: ignore
    numbers = "float" if specs is None else f"{specs.weight} / {specs.input or 'float'}"
    return f"{type(stock).__name__} {words} {numbers} {list(shape.size)} {shape.dtype}"


def layer_work(stock: nn.Module, specs: Specs | None, call: LayerCall, device: str) -> tuple[Work, float]:
    """A layer on an input of its call's width."""
    size, dtype = call.input.size, call.input.dtype
    cut = _cut_rows(size) if stock.weight.ndim == 2 else _cut_places(stock, size)  # pyright: ignore
    layer = float_layer(stock, dtype, device) if specs is None else quantized_layer(stock, specs, dtype, device)
    x = torch.randn(cut, device=device).to(dtype)
    return (lambda: layer(x)), math.prod(size) / math.prod(cut)


def _cut_rows(size: tuple[int, ...]) -> tuple[int, ...]:
    return (min(math.prod(size[:-1]), ROWS), size[-1])


def _cut_places(stock: Any, size: tuple[int, ...]) -> tuple[int, ...]:
    """The input of a convolution with fewer places: its longest axes are halved."""
    cut, least = (
        list(size),
        [1, size[1], *(2 * (width - 1) * gap + 1 for width, gap in zip(stock.kernel_size, stock.dilation, strict=True))],
    )
    while cut[0] * math.prod(cut[2:]) > PLACES * math.prod(stock.stride):
        axis = max((one for one in range(len(cut)) if one != 1 and cut[one] // 2 >= least[one]), key=lambda one: cut[one], default=None)
        if axis is None:
            break
        cut[axis] //= 2
    return tuple(cut)


# --- attention --------------------------------------------------------------------------------------------------------


def attention_key(call: AttentionCall, quantized: bool) -> str:
    """What decides on the time of attention."""
    masked = " masked" if call.masked else ""
    return f"attention {'of quantized models' if quantized else 'stock'} {list(call.query)} {list(call.key)} {call.dtype}{masked}"


def attention_work(call: AttentionCall, quantized: bool, device: str) -> tuple[Work, float]:
    """Attention with fewer queries and heads, and all keys."""
    *outer, queries, width = call.query
    keys, heads = call.key[-2], math.prod(outer)
    few_queries = min(queries, QUERIES)
    few = heads if heads * queries * keys <= SCORES else max(min(heads, SCORES // (few_queries * keys)), 1)
    rows = queries if few == heads and heads * queries * keys <= SCORES else few_queries
    q, k, v = (_operand(few, count, width, call.dtype, device) for count in (rows, keys, keys))
    mask = torch.zeros(1, 1, 1, keys, device=device, dtype=call.dtype) if call.masked else None
    fast = quantized and mask is None and ours.refuses(q, k, v) is None
    work = (lambda: ours.attention(q, k, v)) if fast else (lambda: F.scaled_dot_product_attention(q, k, v, mask))
    return work, heads * queries / (few * rows)


def _operand(heads: int, tokens: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(1, tokens, heads, width, device=device).to(dtype).transpose(1, 2)


# --- other operators --------------------------------------------------------------------------------------------------


def operator_key(call: OperatorCall) -> str:
    """What decides on the time of an operator."""
    return f"{call.operator} {call.arguments} {call.options}"


def operator_work(call: OperatorCall, device: str) -> tuple[Work, float]:
    """An operator with random numbers; where it cannot be called again, a copy of as many bytes."""
    old, new = _axis(call)
    arguments, options = _made(call.arguments, old, new, device), dict(_made(call.options, old, new, device))
    if "device" in options:
        options["device"] = torch.device(device)
    name, _, overload = call.operator.partition(".")
    function = getattr(getattr(torch.ops.aten, name.partition("::")[2]), overload)
    try:
        function(*arguments, **options)
    except Exception:  # it wants indices in a range, or lists that go together
        count = min(max(call.moved // 8, 1), NUMBERS)
        source, target = torch.zeros(2, count, device=device)
        return (lambda: target.copy_(source)), call.moved / (8 * count)
    return (lambda: function(*arguments, **options)), old / new


def _shapes(value: Any) -> Iterator[Shape]:
    if isinstance(value, Shape):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from _shapes(one)


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, tuple):
        for one in value:
            yield from [one] if isinstance(one, int) else _numbers(one)


def _axis(call: OperatorCall) -> tuple[int, int]:
    """Length of the axis that is cut, and what is left of it."""
    shapes = list(_shapes((call.arguments, call.options)))
    most = max(shapes, key=lambda shape: shape.numel)
    told = {*_numbers(call.arguments)}
    free = [length for length in most.size if length not in told]
    longest = max(free, default=1)
    return longest, max(longest // -(-most.numel // NUMBERS), 1)


def _made(value: Any, old: int, new: int, device: str) -> Any:
    if isinstance(value, Shape):
        size = tuple(new if length == old else length for length in value.size)
        full = torch.randn if value.dtype.is_floating_point else torch.zeros
        wide = (*size[:-1], size[-1] * value.gap) if size else size
        made = full(wide, device=device).to(value.dtype)
        return made[..., :: value.gap] if size else made
    if isinstance(value, tuple):
        return tuple(_made(one, old, new, device) for one in value)
    return value


__all__ = ["Timings", "attention_key", "attention_work", "here", "layer_key", "layer_work", "operator_key", "operator_work", "seconds_of"]
