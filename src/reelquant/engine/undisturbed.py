"""What users switch on that would come between a denoiser and what looks at it: compiled calls, and caches of diffusers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from reelquant.discover import plain


@contextmanager
def undisturbed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, these modules run eagerly, every layer in every step; afterwards they are compiled and cached as they were.

    Compiled calls run past hooks. A cache answers with what an earlier step computed, and its hooks want to be told of every step.
    """
    with ExitStack() as stack:
        parts = list(modules)
        if any(_is_compiled(part) for part in parts):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for part in map(plain, parts):
            _without_cache(stack, part)
        yield


def _is_compiled(module: nn.Module) -> bool:
    return plain(module) is not module or any(getattr(part, "_compiled_call_impl", None) for part in module.modules())


def _without_cache(stack: ExitStack, module: Any) -> None:
    config = getattr(module, "_cache_config", None)
    if config is not None and hasattr(module, "disable_cache"):
        module.disable_cache()
        stack.callback(module.enable_cache, config)
