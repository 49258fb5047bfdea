"""The whole answer of a denoiser is kept: at other steps nothing of it runs, whatever computes it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from reelquant.reuse.outputs import Output


class Answer(Output):
    """The denoiser itself as a block. It can be called like the ``forward`` that it stands in for, and has its signature: pipelines look at
    it. Graphs of another runtime take the place of what it asks (:attr:`StandIn.before`)."""

    def __init__(self, name: str, block: nn.Module, *given: Any, **ends: Any) -> None:
        self.__signature__ = inspect.signature(block.forward)
        super().__init__(name, block, *given, **ends)

    @property
    def placed(self) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)
