"""Tell diffusers and transformers about reelquant without importing them.

Neither has entry points for quantizers: two dicts in their ``quantizers.auto`` are the whole registry. They are filled right after that
module has run, whether it is imported before or after ``import reelquant``.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import logging
import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

TARGETS = {  # registry -> the plug-in for it and the name of its quantizer
    "diffusers.quantizers.auto": ("reelquant.integrations.diffusers", "ReelQuantizer"),
    "transformers.quantizers.auto": ("reelquant.integrations.transformers", "ReelQuantHfQuantizer"),
}
logger = logging.getLogger(__name__)
_lock = threading.Lock()


class _Watcher(MetaPathFinder):
    """Finds only :data:`TARGETS`, the way Python would, and registers once its code has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in TARGETS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]  # the loader belongs to this one spec
        return spec


def install() -> None:
    """Register now with the registries that are loaded, with others when they are; safe to call again and from several threads."""
    with _lock:
        if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Watcher())
    for target in TARGETS:
        if target in sys.modules:
            _register(importlib.import_module(target))  # waits if another thread is in the middle of importing it


def _register(registry: ModuleType) -> None:
    name, quantizer = TARGETS[registry.__name__]
    try:
        plugin = importlib.import_module(name)
        registry.AUTO_QUANTIZATION_CONFIG_MAPPING[plugin.METHOD] = plugin.ReelQuantConfig
        registry.AUTO_QUANTIZER_MAPPING[plugin.METHOD] = getattr(plugin, quantizer)
    except Exception:  # importing the library must not fail because of us
        logger.warning("reelquant could not register with %s: quantized checkpoints will not open", registry.__name__, exc_info=True)
