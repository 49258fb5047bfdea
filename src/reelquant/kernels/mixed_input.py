"""Kernels of layers whose channels are mixed first: torch mixes, and a kernel computes the rest of the layer."""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace
from typing import Any

from torch import Tensor

from reelquant.kernels.kernel import Kernel
from reelquant.kernels.operands import Operands


class Mixed:
    """A runner whose input is mixed first, in float32. What it has beside a call is that of the runner it stands before."""

    def __init__(self, operands: Operands, inner: Any) -> None:
        self.operands, self.inner = operands, inner
        vectors = (mix.vector for mix in operands.mix)
        known = tuple(None if one is None else one.detach().float().cpu().numpy().tobytes() for one in vectors)
        self.key = operands.channel_axis, tuple(mix.name for mix in operands.mix), known

    def __call__(self, x: Tensor, *given: Any) -> Tensor:
        return self.inner(self._mixed(x), *given).to(x.dtype)

    def _mixed(self, x: Tensor) -> Tensor:
        """The mixed input; the very tensor that another layer made of this input by the same operations, so its codes are known, too."""
        if x.is_inference():
            return self.operands.mixed(x)
        last = getattr(_last, "entry", None)
        if last is None or not last.holds(x, self.key):
            last = _last.entry = _Entry(x, self.key, self.operands.mixed(x))
        return last.found

    def __getattr__(self, name: str) -> Any:
        if name == "rounding":
            rounding = self.inner.rounding
            return lambda given: Mixed(given, rounding(replace(given, mix=())))
        return getattr(self.inner, name)


class _Entry:
    """What was made of an input: kept as long as that input lives and is not written to, until another is kept in this thread."""

    def __init__(self, x: Tensor, key: Any, found: Tensor) -> None:
        self.version, self.key, self.found = x._version, key, found
        own = weakref.ref(self)
        self.source = weakref.ref(x, lambda _: _let_go(own()))

    def holds(self, x: Tensor, key: Any) -> bool:
        """Whether it was made of this input, as it is now, by these operations."""
        return self.source() is x and self.version == x._version and self.key == key


def _let_go(entry: _Entry | None) -> None:
    if entry is not None:
        del entry.found


_last = threading.local()


def mixing(kernel: Kernel) -> Kernel:
    """The kernel with mixed inputs: it computes a layer if it computes what is left of it."""

    def refuses(operands: Operands) -> str | None:
        return kernel.refuses(replace(operands, mix=()))

    def prepare(operands: Operands) -> Any:
        inner = kernel.prepare(replace(operands, mix=()))
        return Mixed(operands, inner) if operands.mix else inner

    return replace(kernel, takes=kernel.takes | {"mix"}, refuses=refuses, prepare=prepare)
