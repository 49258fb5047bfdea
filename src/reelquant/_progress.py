"""How long work tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Hears how far a long run is. The command line draws bars, and so do the verbs of :mod:`reelquant.api` in a terminal or a notebook."""

    def phase(self, name: str, total: int) -> None:
        """A new phase of ``total`` steps begins."""
        ...

    def advance(self) -> None:
        """One step of the present phase is done."""
        ...


def tell(progress: Progress, sentence: str) -> None:
    """Show a sentence beside the bars, if whoever hears the progress shows sentences: has a method ``tell``."""
    show = getattr(progress, "tell", None)
    if show is not None:
        show(sentence)


class Silent:
    """A :class:`Progress` that says nothing."""

    def phase(self, name: str, total: int) -> None:
        """Ignored."""

    def advance(self) -> None:
        """Ignored."""


PHASES = {
    "plan": "following a clip without computing it",
    "kernels": "timing kernels on this machine",
    "open": "opening the pipeline",
    "calibrate": "sampling calibration clips",
    "record": "recording clips",
    "schedules": "sampling schedules",
    "choose blocks": "trying out blocks",
    "train": "training what is left",
    "float reference": "sampling held-out clips in float",
    "search": "trying out choices",
    "build": "building quantized layers",
    "check": "sampling held-out clips quantized",
    "sample": "sampling",
    "write": "writing the folder",
    "export": "writing layers",
    "pictures": "drawing",
    "peak memory": "measuring peak memory",
    "distances": "distances between sets of clips",
}
"""Name of a phase -> what a bar calls it."""
