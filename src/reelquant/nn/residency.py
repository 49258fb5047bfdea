"""Where the weight of a layer is: in its parameter, or repacked inside the kernel that computes the layer.

A kernel may take the weight over. The parameter then keeps its shape and dtype, but all of its elements share one byte of memory
(:data:`PLACEHOLDER`), and saving, copying and moving the layer get the codes from here. Offloading moves parameters without calling the
layer. So a prepared kernel is valid only as long as the parameter lies where it lay when the kernel was prepared.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from reelquant._errors import UnsupportedError
from reelquant._torch_state import stock_torch
from reelquant.formats import Quantizer
from reelquant.kernels import Kernel, select
from reelquant.nn.host_memory import release_mmap_pages, trim_heap
from reelquant.nn.layer_view import LayerView
from reelquant.nn.output_cache import OutputCache

PLACEHOLDER = 0x5A  # every code of a weight that a kernel owns; no quantizer gives one code to all of a weight
TRIM_EVERY = 64 << 20  # bytes of repacked weights after which the heap is trimmed
_preparing = threading.RLock()  # of all layers: no thread may read a weight between repacking and the placeholder


@dataclass(eq=False)
class Prepared:
    """The kernel of one layer, ready to run.

    Attributes:
        runner: computes the layer.
        kernel: made the runner.
        refused: why each better kernel did not take the layer.
        weight: the parameter's memory when the kernel was prepared. It is kept, so that no other weight can get the same address.
        roundings: bits of inputs -> what computes steps with these from the same repacked weight, once there was one.
        narrow: the weight in fewer bits, ready to run, and these bits, since the first step that reads it so.
        scales: bits -> the quantizer of the weight in fewer bits.
        outputs: outputs of earlier steps.
    """

    runner: Any
    kernel: Kernel
    refused: dict[str, str]
    weight: Tensor
    roundings: dict[int, Any] = field(default_factory=dict)
    narrow: tuple[int, Prepared] | None = None
    scales: dict[int, Quantizer] = field(default_factory=dict)
    outputs: OutputCache = field(default_factory=OutputCache)

    @property
    def owns_weight(self) -> bool:
        """Whether the runner has taken the weight over; ``weight`` is a placeholder then."""
        return getattr(self.runner, "codes", None) is not None

    @property
    def codes(self) -> Tensor:
        """The weight as it is stored."""
        return self.runner.codes() if self.owns_weight else self.weight

    def fits(self, weight: Tensor) -> bool:
        """Whether a weight lies where it did; offloading puts another tensor in its place, or the same values elsewhere."""
        return weight.data_ptr() == self.weight.data_ptr()


class Residency:
    """Owns the repacked weight of one layer, and is all that writes placeholders into its parameter.

    Attributes:
        current: the kernel that was prepared last, valid or not; None if there is none.
    """

    def __init__(self, layer: LayerView) -> None:
        self._layer = weakref.ref(layer)  # a cycle would keep the memory of layers that are dropped one by one
        self.current: Prepared | None = None

    @property
    def layer(self) -> Any:
        """The layer."""
        return self._layer()

    def prepared(self) -> Prepared | None:
        """What is ready to run, if it was prepared from the weight that is in the layer now."""
        current = self.current
        return current if current is not None and current.fits(self.layer._parameters["weight"]) else None

    def prepare(self) -> Prepared:
        """Choose a kernel and let it repack the weight, once; safe to call from several threads."""
        return self.prepared() or self._prepare()

    @stock_torch()
    def _prepare(self) -> Prepared:
        with _preparing:
            if (ready := self.prepared()) is None:
                self.release()
                if not _swept:
                    _release_outdated()
                layer = self.layer
                kernel, refused = self.selected()
                ready = Prepared(kernel.prepare(layer.operands), kernel, refused, layer.weight.data)
                if ready.owns_weight:
                    self._leave_placeholder(ready)
                self.current = ready
                _in_use.add(self)
            return ready

    def _leave_placeholder(self, ready: Prepared) -> None:
        weight = self.layer.weight
        release_mmap_pages(weight.data)
        weight.data = weight.new_full((1,), PLACEHOLDER).expand(weight.shape)
        ready.weight = weight.data
        _trim_sometimes(weight.numel())

    def selected(self) -> tuple[Kernel, dict[str, str]]:
        """The kernel, and why each better one of the device refused the layer."""
        ready, layer = self.prepared(), self.layer
        return (ready.kernel, ready.refused) if ready else select(layer.operands, layer.weight.device.type, layer.kernels)

    def codes(self) -> Tensor:
        """The weight's codes as they are stored, wherever they are now.

        Raises:
            UnsupportedError: if they are lost, because something copied the parameter of a running layer instead of asking the layer.
        """
        current, weight = self.current, self.layer.weight.data
        fits = current is not None and current.fits(weight)
        copied = not fits and _is_placeholder(weight)
        if current is not None and (copied or fits):
            codes = self.layer.stored_again(current.codes) if current.owns_weight else current.codes
            return codes.to(weight.device)
        if copied:
            raise UnsupportedError(
                f"the weight of a quantized layer ({self.layer}) was moved while a kernel held it, without the layer being asked; load the "
                "model again, and call model.to('cpu') before switching on what moves parameters itself (group offloading with streams)"
            )
        return weight

    def release(self) -> None:
        """Take the weight back from the kernel, if the kernel owns it; the next call prepares the layer again."""
        if self.current is None:
            return
        codes, weight = self.codes(), self.layer.weight.data
        if 0 in weight.stride():
            self.layer.weight.data = codes
        elif codes.data_ptr() != weight.data_ptr():
            weight.copy_(codes)  # in place: group offloading keeps this memory and moves copies of it
        self.forget()

    def forget(self) -> None:
        """Drop the prepared kernel with the weight: the layer gets its tensors from elsewhere before it runs again."""
        self.current = None
        _in_use.discard(self)


_in_use: weakref.WeakSet[Residency] = weakref.WeakSet()
_swept = False  # read and written by the thread that holds _preparing


@contextmanager
def many_at_once() -> Iterator[None]:
    """Inside, outdated kernels have been looked for: the layers that are prepared there do not each look at all others.

    For work that offloads nothing while it prepares the layers of a model. Other threads wait until it ends before they prepare a layer.
    """
    global _swept
    with _preparing:
        outer = _swept
        if not outer:
            _release_outdated()
        _swept = True
        try:
            yield
        finally:
            _swept = outer


def _release_outdated() -> None:
    """Release kernels whose weights were offloaded since; offloading does not tell the layers, so the next one that is prepared does."""
    for residency in list(_in_use):
        if residency.layer is not None and residency.prepared() is None:
            residency.release()


_repacked = 0


def _trim_sometimes(size: int) -> None:
    """Trim the heap after :data:`TRIM_EVERY` bytes: repacking leaves holes in it."""
    global _repacked
    _repacked += size
    if _repacked >= TRIM_EVERY:
        trim_heap()
        _repacked = 0


def _is_placeholder(weight: Tensor) -> bool:
    """Whether this is a placeholder, or a copy of one."""
    if weight.device.type == "meta" or not weight.numel():
        return False
    return bool((weight[0] == PLACEHOLDER).all()) and bool((weight == PLACEHOLDER).all())
