"""How long work tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Hears how far a long run is. The command line draws bars; the library is silent."""

    def phase(self, name: str, total: int) -> None:
        """A new phase of ``total`` steps begins."""
        ...

    def advance(self) -> None:
        """One step of the present phase is done."""
        ...


class Silent:
    """A :class:`Progress` that says nothing."""

    def phase(self, name: str, total: int) -> None:
        """Ignored."""

    def advance(self) -> None:
        """Ignored."""
