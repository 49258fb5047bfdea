"""Which denoiser is being called in a thread, and which of its modules asks for attention. What computes it does not belong here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from reelquant.nn.swap import get_module

SITE = "_reelquant_attention_row"  # of a module that asks for attention, while it matters which one does
SITE_HOOKS = "_reelquant_attention_site_hooks"
_thread = threading.local()
_row = 0
"""For compiled graphs, which cannot look at threads: row of the module that is running."""


@dataclass(frozen=True)
class Where:
    """Where a call of attention stands.

    Attributes:
        row: by the module that asks.
        slot: index of the denoising step.
        protected: whether the step is protected.
    """

    row: int = 0
    slot: int = 0
    protected: bool = False


@dataclass
class Running:
    """A denoiser that is being called.

    Attributes:
        model: its identity.
        acting: what computes its attention.
        clock: of its steps, or None.
        row: of the module that is running.
    """

    model: int
    acting: Any
    clock: Any
    row: int = 0

    @property
    def where(self) -> Where:
        """Where a call of attention stands now."""
        now = None if self.clock is None else self.clock.now()
        return Where(self.row) if now is None else Where(self.row, int(now.slot), now.protected)


def stack() -> list[Running]:
    """The denoisers that are being called in this thread, outermost first."""
    if not hasattr(_thread, "stack"):
        _thread.stack = []
    return _thread.stack


def running() -> bool:
    """Whether a started denoiser is being called in this thread."""
    return bool(stack())


def end(module: nn.Module) -> None:
    """Take a denoiser, and those called inside of it, from the stack; nothing happens if it is not there."""
    own = stack()
    places = [place for place, one in enumerate(own) if one.model == id(module)]
    if places:
        del own[places[0] :]


def row_in_graph() -> int:
    """The row of the module that a compiled graph is in."""
    return _row


def enter_row(row: int) -> None:
    """A module of this row runs from now on."""
    global _row
    if torch.compiler.is_compiling():
        _row = row
    elif own := stack():
        own[-1].row = row


def enter_model(row: int) -> None:
    """A denoiser begins, whose own calls have this row."""
    global _row
    _row = row


def mark(model: nn.Module, sites: Iterable[str], row_of: Callable[[str], int]) -> None:
    """Let calls of attention tell which module they come from.

    All modules of the classes of these sites are marked: compiled code of one block serves the next one unless it has looked at
    something in which they differ, and hooks are not looked at.
    """
    kinds = tuple({type(get_module(model, name)) for name in sites if name})
    rows = {name: row_of(name) for name, module in model.named_modules() if not name or isinstance(module, kinds)}
    handles: list[RemovableHandle] = []
    for name, row in rows.items():
        if name:
            module, outer = get_module(model, name), max((one for one in rows if _holds(one, name)), key=len)
            object.__setattr__(module, SITE, (row, rows[outer]))
            handles += [module.register_forward_pre_hook(_enter_site), module.register_forward_hook(_leave_site)]
    object.__setattr__(model, SITE_HOOKS, handles)


def _holds(outer: str, name: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def unmark(model: nn.Module) -> None:
    """Undo :func:`mark`."""
    for handle in vars(model).pop(SITE_HOOKS, ()):
        handle.remove()
    for module in model.modules():
        vars(module).pop(SITE, None)


def _enter_site(module: nn.Module, args: Any) -> None:
    enter_row(getattr(module, SITE)[0])


def _leave_site(module: nn.Module, args: Any, output: Any) -> None:
    enter_row(getattr(module, SITE)[1])
