"""Tell other libraries about reelquant without importing them.

Neither diffusers nor transformers has entry points for quantizers: two dicts in their ``quantizers.auto`` are the whole registry. They are
filled right after that module has run, whether it is imported before or after ``import reelquant``. peft knows only the quantizers it comes
with.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

logger = logging.getLogger(__name__)
_lock = threading.Lock()


class _Watcher(MetaPathFinder):
    """Finds only :data:`TARGETS`, the way Python would, and plugs in once their code has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in TARGETS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_plug_in(module: ModuleType) -> None:
            run(module)
            _plug_in(module)

        spec.loader.exec_module = run_and_plug_in  # type: ignore[method-assign]  # the loader belongs to this one spec
        return spec


def install() -> None:
    """Plug in now where a target is loaded, else when it is; safe to call again and from several threads."""
    with _lock:
        if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Watcher())
    for target in TARGETS:
        if target in sys.modules:
            _plug_in(importlib.import_module(target))  # waits if another thread is in the middle of importing it


def _plug_in(module: ModuleType) -> None:
    try:
        TARGETS[module.__name__](module)
    except Exception:  # importing the library must not fail because of us
        logger.warning("reelquant could not plug into %s, which may be of a version it does not know", module.__name__, exc_info=True)


def _quantizer(plugin: str, name: str, registry: ModuleType) -> None:
    found = importlib.import_module(plugin)
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[found.METHOD] = found.ReelQuantConfig
    registry.AUTO_QUANTIZER_MAPPING[found.METHOD] = getattr(found, name)


def _guard(plugin: str, module: ModuleType) -> None:
    importlib.import_module(plugin).guard(module)


REBUILT = tuple(
    f"diffusers.models.{name}"
    for name in ("unets.unet_motion_model", *(f"controlnets.controlnet{end}" for end in ("", "_flux", "_qwenimage", "_sd3", "_union")))
)
"""Where diffusers builds a model with the tensors of another one: AnimateDiff's UNet around one for pictures, and ControlNets."""

TARGETS: dict[str, Callable[[ModuleType], None]] = {
    "diffusers.quantizers.auto": functools.partial(_quantizer, "reelquant.integrations.diffusers", "ReelQuantizer"),
    "transformers.quantizers.auto": functools.partial(_quantizer, "reelquant.integrations.transformers", "ReelQuantHfQuantizer"),
    "peft.tuners.lora.layer": functools.partial(_guard, "reelquant.integrations.peft"),
    **dict.fromkeys(REBUILT, functools.partial(_guard, "reelquant.integrations.rebuilt")),
}
"""Module of another library -> what is done once it has run."""
