"""What a streamed quantization will take, before it starts: from headers and shapes alone."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from torch import nn

from reelquant._errors import CheckpointError, RecipeError
from reelquant.checkpoint import Workspace
from reelquant.nn import get_module
from reelquant.recipes.calibration import ROWS, templates
from reelquant.recipes.offload import OnDisk
from reelquant.recipes.plan import Plan
from reelquant.recipes.search import candidates, trial_count

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
CGROUP = Path("/sys/fs/cgroup/memory.max")
# Bytes at the peak of building a layer: per weight (measured on one of 157 million weights: 20.4), and per element of its second moment
# (an assumption, not measured: the moments, their covariance, and a factorization in double precision).
PER_WEIGHT, PER_MOMENT = 21, 48
GUIDED = 2  # denoiser calls per step: samplers with guidance make two


@dataclass(frozen=True)
class Estimate:
    """Bytes, calls and seconds.

    Attributes:
        source: the float checkpoint as it is stored, all components.
        in_memory: memory that the way through memory needs.
        memory: memory that streaming needs, the activations of a denoiser call left out.
        largest: what takes most of it, in words.
        disk: free space that is needed until the work is done, the result included.
        result: the folder that will be there in the end.
        moved: bytes that are read and written until then.
        calls: denoiser calls, at most (half of them without guidance); 0 for data-free recipes.
    """

    source: int
    in_memory: int
    memory: int
    largest: str
    disk: int
    result: int
    moved: int
    calls: int

    def check_memory(self, budget: int) -> None:
        """Refuse a budget that a single layer breaks.

        Raises:
            RecipeError: with the budget that would do.
        """
        if self.memory > budget:
            raise RecipeError(
                f"--max-memory {_words(budget)} is too little: {self.largest} and the libraries take {_words(self.memory)}; allow that "
                "much, or choose a recipe without 'solve: gptq'"
            )


def parse_bytes(text: str | int) -> int:
    """``"8GB"``, ``"500MB"``, ``"1.5 GiB"`` or a number of bytes.

    Raises:
        RecipeError: if it is none of these, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = UNITS.get((found[2] or "B").upper()) if found else None
    if not found or unit is None or float(found[1]) * unit < 1:
        raise RecipeError(f"'{text}' is no amount of memory; write it like 8GB, 500MB or 1.5GiB")
    return int(float(found[1]) * unit)


def free_memory() -> int:
    """Bytes that this process may still use: what is free, or what its control group allows."""
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    free = psutil.virtual_memory().available
    return free if limit == "max" else min(free, int(limit))


def estimate(stored: Mapping[str, int], disks: Mapping[str, OnDisk], plans: Mapping[str, Plan], call: Mapping[str, Any]) -> Estimate:
    """Add up what the components take; ``stored`` are the bytes of each in the source."""
    others = sum(size for name, size in stored.items() if name not in plans)
    floats = sum(_bytes(disk.model) for disk in disks.values()) + sum(size for name, size in stored.items() if name not in disks)
    first = next(iter(plans.values()))  # says where the blocks of a denoiser without a plan are
    outside = sum(_bytes(disk.model) - sum(_blocks(plans.get(name, first), disk)) for name, disk in disks.items())
    parts = [_component(plan, disks[name], call, outside) for name, plan in plans.items()]
    base = psutil.Process().memory_info().rss
    memory, largest = max((part["memory"], part["largest"]) for part in parts)
    result = others + sum(part["result"] for part in parts)
    return Estimate(
        source=sum(stored.values()),
        in_memory=base + floats + memory + sum(part["statistics"] for part in parts),
        memory=base + memory,
        largest=largest,
        disk=result + sum(part["scratch"] for part in parts),
        result=result,
        moved=2 * others + 3 * result + sum(stored[name] * part["reads"] for name, part in zip(plans, parts, strict=True)),
        calls=sum(part["calls"] for part in parts),
    )


def _blocks(plan: Plan, disk: OnDisk) -> list[int]:
    return [_bytes(get_module(disk.model, name)) for name in disk.present(plan.map.blocks)]


def _component(plan: Plan, disk: OnDisk, call: Mapping[str, Any], outside: int) -> dict[str, Any]:
    model, recipe = disk.model, plan.recipe
    layers = {row.layer.name: math.prod(row.layer.shape) for row in plan.quantized}
    floats = _bytes(model)
    result = floats - sum(_bytes(get_module(model, name)) for name in layers) + sum(row.bytes_after for row in plan.quantized)
    widest = max(layers, key=layers.__getitem__)
    need = {f"building layer '{widest}'": PER_WEIGHT * layers[widest]}
    if recipe.calibrate is None:
        memory, largest = max((size, what) for what, size in need.items())
        return {"memory": memory, "largest": largest, "statistics": 0, "result": result, "scratch": result, "reads": 1, "calls": 0}
    steps = call.get("num_inference_steps") or recipe.calibrate.steps or 50
    runs = math.ceil(recipe.calibrate.prompts / recipe.calibrate.batch)
    held = math.ceil(recipe.search.prompts / 4)
    trials = trial_count(plan, plan.map.groups) if len(candidates(plan)) > 1 else 0
    measured = steps + 1 if recipe.protect_steps is not None and recipe.protect_steps.steps == "auto" else 0
    sampled = steps * runs + (2 + measured) * steps * held + recipe.search.steps * held * (trials + bool(trials))
    inputs = templates(plan, model)
    columns = {own.name: own.geometry.channels * own.geometry.taps for own in inputs.values()}
    moments = {own.name: columns[own.name] for own in inputs.values() if own.gram is not None}
    rows = sum(ROWS * count * 4 for count in columns.values())
    if moments:
        name = max(moments, key=moments.__getitem__)
        need[f"solving layer '{name}'"] = PER_MOMENT * moments[name] ** 2 + PER_WEIGHT * layers[name]
    need["the parts outside of blocks, and the largest block,"] = outside + max(_blocks(plan, disk), default=0)
    memory, largest = max((size, what) for what, size in need.items())
    logs = rows + sum(3 * 4 * count**2 for count in moments.values())  # rows, the moments so far, the moments that replace them
    statistics = rows + sum(4 * count**2 for count in moments.values())
    return {
        "memory": memory, "largest": largest, "statistics": statistics, "result": result,
        "scratch": result + logs + (result if trials else 0), "reads": 2 + trials + sampled * GUIDED, "calls": sampled * GUIDED,
    }  # fmt: skip


def _bytes(model: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in (*model.parameters(), *model.buffers()))


def _stored(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_room(work: Workspace, expected: Estimate) -> None:
    """Refuse to start on a disk that cannot hold the work; what an interrupted run has written counts.

    Raises:
        CheckpointError: with both figures.
    """
    done = _stored(work.folder)
    free = shutil.disk_usage(work.folder).free
    if (more := expected.disk - done) > free:
        raise CheckpointError(
            f"'{work.target.parent}' has {_words(free)} free, the work takes {_words(more)} (the result {_words(expected.result)}); "
            "free space or choose another folder"
        )


def _words(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
