"""The exceptions of reelquant.

    ReelQuantError
    ├── RecipeError(ValueError)        a recipe, a --set override or a spec says something impossible
    ├── SiteError(LookupError)         a layer pattern matches nothing, a layer is not where it should be
    ├── UnsupportedError(NotImplementedError)   a combination that no mechanism here can compute
    ├── MeasurementError(ValueError)   clips, features or figures that a metric or a report cannot take
    ├── CalibrationError(RuntimeError) the sampling pass failed: no prompts, NaN or inf activations, no denoiser calls
    ├── RanksError(RuntimeError)       one of several processes failed, is lost, or was asked for something else than the others
    └── CheckpointError(OSError)       a folder or file is missing, truncated, corrupt, or already there

Every message says what went wrong, where, the value that was given, and what would work.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable


class ReelQuantError(Exception):
    """Base of everything reelquant raises on purpose; catch this one to catch them all."""


class RecipeError(ReelQuantError, ValueError):
    """A recipe, an override or a specification that cannot be followed."""


class SiteError(ReelQuantError, LookupError):
    """A layer or a pattern of layers that does not exist in this model."""


class UnsupportedError(ReelQuantError, NotImplementedError):
    """A combination of mechanisms that is known but cannot be computed here."""


class MeasurementError(ReelQuantError, ValueError):
    """Clips, features or figures that a metric or a report cannot take."""


class CalibrationError(ReelQuantError, RuntimeError):
    """Calibration could not collect usable statistics."""


class RanksError(ReelQuantError, RuntimeError):
    """One of several processes that work together failed, is lost, or was asked for something else than the others.

    Attributes:
        consequence: another process has the cause, and tells it.
    """

    def __init__(self, message: str = "", *, consequence: bool = False) -> None:
        super().__init__(message)
        self.consequence = consequence


class CheckpointError(ReelQuantError, OSError):
    """A checkpoint that is missing, broken, of a foreign format, or would be overwritten."""


def printable(text: str) -> str:
    """Text of others with everything spelled out that a terminal obeys: escape sequences, control characters, directions of writing."""
    return "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in text)


MOST = 600  # letters of a list of names in an error


def nearest(name: str, known: Iterable[str]) -> str:
    """Close of an error message: the nearest known name if one is near, else all of them (of many the first 40, or :data:`MOST` letters).

    Example:
        >>> nearest("qvd-w8a9", ["qvd-w8a8", "w4a16"])
        "did you mean 'qvd-w8a8'?"
    """
    options = list(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    ends = itertools.accumulate(len(option) + 2 for option in options[:40])
    told = options[: max(1, sum(end <= MOST for end in ends))]
    more = f" ... ({len(options)} in all)" if len(told) < len(options) else ""
    return f"known: {', '.join(told) or 'none'}{more}"
