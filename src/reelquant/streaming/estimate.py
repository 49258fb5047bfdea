"""What a streamed quantization will take, before it starts: from headers and shapes alone."""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from reelquant._errors import CheckpointError, RecipeError
from reelquant.checkpoint import Workspace
from reelquant.engine.build import shared_rewrites
from reelquant.engine.calibration import Expected, templates
from reelquant.engine.plan import LayerPlan, Plan
from reelquant.engine.quality import model_bytes
from reelquant.engine.search import candidates, trial_count
from reelquant.engine.sizes import quantized_bytes
from reelquant.nn import get_module
from reelquant.observe import BUDGET, InputStatistics
from reelquant.streaming.offload import OnDisk
from reelquant.streaming.stage_calls import GUIDED, StageCalls, by_name, held_out_batches, resampled_steps

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
CGROUP = Path("/sys/fs/cgroup")
# Bytes at the peak of building a layer: per weight without data (measured on one of 71 million weights: 8.1 with int8, 9.6 with int4)
# and with it (transforms and bias correction hold float32 copies of their own).
PLAIN, TRANSFORMED = 10, 18
PER_SHARED = 8  # bytes per weight of the layers that share a transformed input: float32, and once more rewritten
PER_BLOCK = 8  # copies of a block: float layers, rewritten ones, soft ones with gradients and two moments of the optimizer
FRAME = 1000  # bytes of a frame in a log beside its numbers


@dataclass(frozen=True)
class Estimate:
    """Bytes, calls and seconds.

    Attributes:
        source: the float checkpoint as it is stored, all components.
        in_memory: memory that the way through memory needs.
        memory: memory that streaming needs, the components beside the denoisers included, the activations of a denoiser call left out.
        largest: what takes most of it, in words.
        disk: free space that is needed until the work is done, the result included, remembered outputs of the denoiser left out: their
            size shows with the first.
        outputs: how many of those are kept at a time, at most.
        result: the folder that will be there in the end.
        moved: bytes that streaming reads and writes until then.
        calls: denoiser calls, at most (half of them without guidance); 0 for data-free recipes.
        stages: how many of those a stage makes beside calibration, search and check, by what the recipe calls it.
    """

    source: int
    in_memory: int
    memory: int
    largest: str
    disk: int
    result: int
    moved: int
    calls: int
    outputs: int
    stages: dict[str, int]

    def check_memory(self, budget: int) -> None:
        """Refuse a budget that a single layer breaks.

        Raises:
            RecipeError: with the budget that would do.
        """
        if self.memory > budget:
            raise RecipeError(
                f"--max-memory {_words(budget)} is too little: {self.largest}, the other components and the libraries take "
                f"{_words(self.memory)}; allow that much, or choose a recipe whose stages need less"
            )


def parse_bytes(text: str | int) -> int:
    """``"8GB"``, ``"500MB"``, ``"1.5 GiB"`` or a number of bytes.

    Raises:
        RecipeError: if it is none of these, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = UNITS.get((found[2] or "B").upper()) if found else None
    if not found or unit is None or float(found[1]) * unit < 1:
        raise RecipeError(f"'{text}' is not an amount of memory; write it like 8GB, 500MB or 1.5GiB")
    return int(float(found[1]) * unit)


def free_memory() -> int:
    """Bytes that this process may still use: what is free, or what its control group leaves of its limit."""
    limit = CGROUP / "memory.max"
    most = limit.read_text().strip() if limit.is_file() else "max"
    free = psutil.virtual_memory().available
    return free if most == "max" else min(free, max(int(most) - _used(), 0))


def _used() -> int:
    """Bytes that a control group holds and does not give back when asked: file pages that nothing looks at go first."""
    idle = re.search(r"^inactive_file (\d+)", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
    return int((CGROUP / "memory.current").read_text()) - (int(idle[1]) if idle else 0)


def estimate(
    stored: Mapping[str, int], disks: Mapping[str, OnDisk], plans: Mapping[str, Plan], call: Mapping[str, Any], resident: int = 0
) -> Estimate:
    """Add up what the components take.

    Args:
        stored: bytes of each component in the source.
        disks: the denoisers.
        plans: what happens to those that are quantized.
        call: arguments of the pipeline call during calibration.
        resident: bytes of components that are in memory all the time.
    """
    others = sum(size for name, size in stored.items() if name not in plans)
    floats = sum(model_bytes(disk.model) for disk in disks.values()) + sum(size for name, size in stored.items() if name not in disks)
    first = next(iter(plans.values()))  # says where the blocks of a denoiser without a plan are
    outside = sum(model_bytes(disk.model) - sum(_blocks(plans.get(name, first), disk)) for name, disk in disks.items())
    outside += sum(_apart(plans.get(name, first), disk) for name, disk in disks.items())
    parts = [_component(plan, disks[name], call, outside) for name, plan in plans.items()]
    base = psutil.Process().memory_info().rss
    memory, largest = max((part.memory, part.largest) for part in parts)
    result = others + sum(part.result for part in parts)
    return Estimate(
        source=sum(stored.values()),
        in_memory=base + floats + memory + sum(part.statistics for part in parts),
        memory=base + resident + memory,
        largest=largest,
        disk=result + sum(part.scratch for part in parts),
        result=result,
        moved=2 * others + 3 * result + sum(stored[name] * part.reads for name, part in zip(plans, parts, strict=True)),
        calls=sum(part.calls for part in parts),
        outputs=sum(part.outputs for part in parts),
        stages=dict(sum((Counter(part.stages) for part in parts), Counter[str]())),
    )


def _blocks(plan: Plan, disk: OnDisk) -> list[int]:
    return [model_bytes(get_module(disk.model, name)) for name in disk.present(plan.map.blocks)]


def _apart(plan: Plan, disk: OnDisk) -> int:
    """Bytes of what stays in memory although it lies in blocks."""
    return sum(model_bytes(get_module(disk.model, name)) for name in disk.present(plan.map.apart))


@dataclass(frozen=True)
class _Part:
    """What one component takes; bytes, but ``reads`` (of its whole checkpoint), ``calls`` and ``outputs``."""

    memory: int
    largest: str
    result: int
    scratch: int
    statistics: int = 0
    reads: int = 1
    calls: int = 0
    outputs: int = 0
    stages: Mapping[str, int] = field(default_factory=dict)


def _component(plan: Plan, disk: OnDisk, call: Mapping[str, Any], outside: int) -> _Part:
    model = disk.model
    result = quantized_bytes(plan, model, stored=True)
    if plan.recipe.calibrate is None:
        memory, largest = _largest(_building(plan))
        return _Part(memory, largest, result, result)
    sampling = _Sampling.of(plan, call)
    inputs = list(templates(plan, model, torch.Generator(), sampling.expected)[0].values())
    logs = sum(_log_bytes(own, sampling.expected.calls * GUIDED) for own in inputs)
    states = sum(member.memory_bytes() for own in inputs for member in own.members.values() if member.compacts)
    blocks = max(_blocks(plan, disk), default=0)
    need = _building(plan) | _transforming(plan) | _improving(plan, blocks)
    need["the parts outside of blocks, and the largest block,"] = outside + blocks
    memory, largest = _largest(need)
    stages = [StageCalls.of(plan, entry, sampling.expected) for entry in plan.entries]
    sampled, own = sampling.steps * GUIDED + sum(stage.whole for stage in stages), sum(stage.own for stage in stages)
    return _Part(
        memory,
        largest,
        result,
        # on disk, a state is the frames that it will absorb, the state so far, and the state that replaces it
        result + logs + 3 * states + sampling.drafts * result,
        logs + states,
        2 + sampling.trials + sampled,
        sampled + own,
        sampling.remembered * GUIDED,
        by_name(stages),
    )


def _largest(need: Mapping[str, int]) -> tuple[int, str]:
    return max((size, what) for what, size in need.items())


@dataclass(frozen=True)
class _Sampling:
    """How much a component is sampled.

    Attributes:
        expected: of the calibration pass.
        trials: candidates that are sampled.
        steps: denoising steps of everything together, but for what stages sample.
        remembered: steps whose outputs are on disk at a time, at most.
        drafts: copies of the result that trials leave on disk, at most.
    """

    expected: Expected
    trials: int
    steps: int
    remembered: int
    drafts: int

    @classmethod
    def of(cls, plan: Plan, call: Mapping[str, Any]) -> _Sampling:
        recipe = plan.recipe
        assert recipe.calibrate is not None
        given = {"num_inference_steps": call.get("num_inference_steps") or recipe.calibrate.steps}
        expected = Expected.of(recipe.calibrate.prompts + recipe.calibrate.probe_count, recipe.calibrate.batch, given)
        held = held_out_batches(recipe)
        trials = trial_count(plan, plan.map.groups) if len(candidates(plan)) > 1 else 0
        further = sum(entry.stage.held_out_runs(expected.steps) for entry in plan.entries) * expected.steps * held
        further += sum(resampled_steps(plan, entry, expected) for entry in plan.entries)
        always, trial = expected.calls + 2 * expected.steps * held, recipe.search.steps * held
        drafts = bool(trials) * (len(candidates(plan)) if recipe.search.scope == "family" else 1)
        remembered = always + further + 2 * bool(trials) * trial
        return cls(expected, trials, always + trial * (trials + bool(trials)), remembered, drafts)


def _building(plan: Plan) -> dict[str, int]:
    """The peak of building a layer: copies of its weight, and what its stages need on top."""
    per_weight = PLAIN if plan.recipe.data_free else TRANSFORMED
    return {f"building layer '{row.layer.name}'": _peak(row, per_weight) for row in plan.quantized}


def _peak(row: LayerPlan, per_weight: int) -> int:
    rows, width = row.layer.shape[0], math.prod(row.layer.shape[1:])
    return per_weight * rows * width + max((entry.stage.peak_bytes(rows, width) for entry in row.entries), default=0)


def _transforming(plan: Plan) -> dict[str, int]:
    """What the layers take together whose shared input is rewritten, by words for them."""
    need: dict[str, int] = {}
    for group in plan.map.groups:
        rows = [plan.layers[name] for name in group.layers if plan.layers[name].skipped is None]
        if stages := [entry.stage for entry in shared_rewrites(rows)]:
            shapes = [(row.layer.shape[0], math.prod(row.layer.shape[1:])) for row in rows]
            own = max(stage.peak_bytes(*shape) for stage in stages for shape in shapes)
            weights = sum(map(math.prod, shapes))
            need[f"rewriting the input of '{rows[0].layer.name}' and {len(rows) - 1} more"] = PER_SHARED * weights + own
    return need


def _improving(plan: Plan, block: int) -> dict[str, int]:
    """Stages that work on a block hold it several times over, and recorded calls within their budget."""
    if not plan.acting("solve_block"):
        return {}
    return {"improving a block": PER_BLOCK * block + 2 * BUDGET}


def _log_bytes(own: InputStatistics, calls: int) -> int:
    """Bytes that the calls leave of one input on disk, compacting statistics left out."""
    return calls * FRAME + sum(member.log_bytes(calls) for member in own.members.values() if not member.compacts)


def _stored(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_room(work: Workspace, expected: Estimate, output: int = 0) -> None:
    """Refuse a disk that cannot hold the work; what has been written counts. ``output`` are the bytes of a remembered output.

    Raises:
        CheckpointError: with both figures.
    """
    done = _stored(work.folder)
    free = shutil.disk_usage(work.folder).free
    if (more := expected.disk + expected.outputs * output - done) > free:
        raise CheckpointError(
            f"'{work.target.parent}' has {_words(free)} free, the work takes {_words(more)} (the result {_words(expected.result)}); "
            "free space or choose another folder" + (", or calibrate with shorter, smaller clips" if output else "")
        )


def _words(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
