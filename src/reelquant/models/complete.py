"""Models that get all their tensors, and no tensor that they have no place for: what libraries say about that in their logs is an error.

diffusers and transformers fill what a checkpoint lacks with random numbers, drop what does not fit, and only log it. Both log it from one
module each, before ``from_pretrained`` returns; so does ``from_single_file``.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reelquant._errors import CheckpointError, ReelQuantError
from reelquant._remarks import remark
from reelquant.models.blank import CLASS, CONFIG, read_json

SETTINGS = "diffusers.configuration_utils"
LOGGERS = (SETTINGS, "diffusers.models.modeling_utils", "diffusers.loaders.single_file_model", "transformers.modeling_utils")
PROBLEMS = {  # words of their messages -> what is wrong
    re.compile(r"newly initialized|\bMISSING\b|\bMISMATCH\b"): "tensors are missing or have another shape, and would be random numbers",
    re.compile(r"were not used when|\bUNEXPECTED\b"): "tensors have no place in the model that its config.json describes",
}
IGNORED = re.compile(r"not expected and will be ignored")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_NAME = re.compile(r"(?:[A-Za-z_]\w*\.)+(?:\w+|\{[^}]*\})(?:\.\w+)*")
_TO = re.compile(r"were passed to (\w+)")


class _Listener(logging.Filter):
    """Takes the messages of one thread that speak of missing or surplus tensors, and lets the level decide on the others.

    A filter of the logger, as a handler would be asked after the level, and the command line sets that to errors only.
    """

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level, self._thread = level, threading.get_ident()
        self.heard: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        text = _ESCAPES.sub("", record.getMessage()) if record.levelno >= logging.WARNING else ""
        if threading.get_ident() == self._thread and any(pattern.search(text) for pattern in (*PROBLEMS, IGNORED)):
            self.heard.append(text)
            return False
        return record.levelno >= self._level


@contextmanager
def complete(model: object) -> Iterator[None]:
    """Inside, a checkpoint that lacks tensors of its model, or has some too many, is refused when the block ends.

    Settings that a class does not know are remarked, or an error where the class has written them itself.

    Args:
        model: what error messages call it.

    Raises:
        CheckpointError: with the first such tensor.
    """
    listeners: list[tuple[logging.Logger, int, _Listener]] = []
    for name in LOGGERS:
        its = logging.getLogger(name)
        listeners.append((its, its.level, _Listener(its.getEffectiveLevel())))
        its.addFilter(listeners[-1][2])
        its.setLevel(min(logging.WARNING, its.getEffectiveLevel()))
    try:
        yield
    except ReelQuantError:
        raise
    except Exception:
        _raise_heard(model, listeners)  # says more than what follows from it
        raise
    finally:
        for its, level, listener in listeners:
            its.removeFilter(listener)
            its.setLevel(level)
    _raise_heard(model, listeners)


def _raise_heard(model: object, listeners: list[tuple[logging.Logger, int, _Listener]]) -> None:
    for *_, listener in listeners:
        for text in listener.heard:
            if IGNORED.search(text):
                _unknown_settings(model, text)
                continue
            raise CheckpointError(f"cannot open pipeline '{model}': {_sentence(text)}") from None


def _unknown_settings(model: object, text: str) -> None:
    """Settings come and go with versions of diffusers, and then the tensors decide. This version knows what it writes, but for schedulers,
    which keep settings of others.

    Raises:
        CheckpointError: for a model whose config says that this version wrote it.
    """
    import diffusers

    kind = found[1] if (found := _TO.search(text)) else ""
    configs = Path(str(model)).glob(f"*/{CONFIG}") if isinstance(model, str | Path) else ()
    for config in configs:
        told = read_json(config)
        if told.get(CLASS) == kind and told.get("_diffusers_version") == diffusers.__version__:
            raise CheckpointError(
                f"'{config}' says that diffusers {diffusers.__version__} wrote it, and has settings that its {kind} does not know: "
                f"{' '.join(text.split()):.200}; download or save it again, or remove them"
            )
    remark(f"{model}: {' '.join(text.split()):.300}")


def _sentence(text: str) -> str:
    problem = next(words for pattern, words in PROBLEMS.items() if pattern.search(text))
    which = next((found[0] for found in _NAME.finditer(text) if not found[0].startswith(("torch.", "nn."))), "")
    where = re.search(r"initializ(?:ing|ed) ([A-Z]\w+)|weights of ([A-Z]\w+)|^([A-Z]\w+) LOAD", text)
    kind = next((word for word in where.groups() if word), "") if where else ""
    some = ", ".join(part for part in (kind, f"'{which}' first" if which else "") if part)
    return f"{problem}{f' ({some})' if some else ''}; download or save it again"
