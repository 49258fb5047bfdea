"""Processes of their own, for tests that kill one, limit one, or ask what one does that has loaded nothing of reelquant.

They are forked from a server that has imported the libraries below this package, which takes longer than most of what tests do there.
Tests of imports start an interpreter instead.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONTEXT: Any = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "diffusers.pipelines.wan.pipeline_wan", "transformers", "peft", "numba", "scipy.optimize", "pydantic", "typer", "rich.table"]
)


def reelquant(words: Sequence[object], errors: Path, prepare: Callable[[], None] | None = None) -> BaseProcess:
    """``python -m reelquant`` with these words, started.

    Args:
        words: the arguments.
        errors: a file for what it writes to the standard error; its standard output goes nowhere.
        prepare: called in the process first; a function of a module.
    """
    return _started(_command, [str(word) for word in words], str(errors), prepare)


def run(code: str, *arguments: object) -> None:
    """Python code that has imported nothing of reelquant; ``sys.argv[1:]`` are the arguments. It has to succeed."""
    process = begin(code, *arguments)
    process.join()
    assert process.exitcode == 0


def begin(code: str, *arguments: object) -> BaseProcess:
    """The same, started."""
    return _started(_code, code, [str(word) for word in arguments])


def as_rank(number: int, count: int, port: int, more: Mapping[str, str] = {}) -> None:
    """Give this process the variables that torchrun gives one of several processes of a machine."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update({"RANK": str(number), "WORLD_SIZE": str(count), "LOCAL_RANK": str(number), **where, **more})


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def _started(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = CONTEXT.Process(target=target, args=(*arguments, _threads()))
    process.start()
    return process


def _threads() -> int:
    """Sums depend on the number of threads."""
    import torch

    return torch.get_num_threads()


def _begin(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]


def _command(words: list[str], errors: str, prepare: Callable[[], None] | None, threads: int) -> None:
    _begin(threads)
    for number, name in ((1, os.devnull), (2, errors)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if prepare is not None:
        prepare()
    sys.argv = ["reelquant", *words]
    runpy.run_module("reelquant", run_name="__main__")


def _code(code: str, arguments: list[str], threads: int) -> None:
    _begin(threads)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})
