"""What the two pipelines of an evaluation cost: bytes of their folders always, times and peak memory if they are asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reelquant._errors import UnsupportedError
from reelquant._progress import Progress
from reelquant.evidence.speed import benchmark
from reelquant.evidence.store import Store, write_json
from reelquant.models.condition import Condition
from reelquant.models.pipelines import locate
from reelquant.models.weight_files import component_folders, sole_variant, weight_bytes

ROUNDS = 3  # clips that each pipeline makes in turns, after one that does not count
SPEED = "speed.json"


def check_speed(test: Any, reference: Any) -> None:
    """Refuse pipelines in memory: peak memory is measured in processes of their own.

    Raises:
        UnsupportedError: naming the side.
    """
    for side, model in {"test": test, "reference": reference}.items():
        if not isinstance(model, str | Path):
            raise UnsupportedError(
                f"speed is measured of pipelines on disk, and the {side} is in memory; save it first (reelquant.save), or leave speed out"
            )


def speed(
    store: Store,
    test: Any,
    reference: Any,
    prompt: Condition,
    *,
    device: str,
    files: str | None,
    progress: Progress,
    call: Mapping[str, Any],
) -> dict[str, Any]:
    """Times and peak memory of both pipelines, in turns, as :meth:`reelquant.evidence.speed.Benchmark.to_json`.

    They lie in the folder of the evaluation, so a run that is resumed does not measure them again.

    Args:
        store: of the evaluation.
        test, reference: places of the pipelines.
        prompt: of the first clip, which both make.
        device, files, progress, call: as for :func:`reelquant.evidence.speed.benchmark`.
    """
    file = store.root / SPEED
    if (before := _read(file)) is not None:
        return before
    how = dict(rounds=ROUNDS, device=device, variant=files, progress=progress)
    call = {name: value for name, value in call.items() if name not in prompt.inputs}
    found = benchmark(str(test), str(reference), prompt=prompt if prompt.text or prompt.inputs else None, **how, **call).to_json()
    write_json(file, found)
    return found


def _read(file: Path) -> dict[str, Any] | None:
    """What was measured before; None if there is nothing, or if the file is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "speedup" in found else None


def folder_bytes(test: Any, reference: Any, files: str | None = None) -> dict[str, int | None]:
    """Bytes of all weights of both pipelines as they are stored; None for one in memory or on the hub."""
    return {"reference": _stored(reference, files), "test": _stored(test, None)}


def _stored(model: Any, files: str | None) -> int | None:
    folder = Path(locate(model)) if isinstance(model, str | Path) else None
    if folder is None or not folder.is_dir():
        return None
    return weight_bytes(component_folders(folder), files or sole_variant(folder)) or None
