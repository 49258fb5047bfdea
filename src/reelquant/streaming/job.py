"""What is to be done from disk to disk: everything that decides the result, planned before anything is sampled."""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from reelquant._errors import UnsupportedError
from reelquant._version import __version__
from reelquant.checkpoint import Shards
from reelquant.discover import discover, discover_or_outline, stand_in
from reelquant.engine.build import Context, GroupWork, build_layer
from reelquant.engine.choice import Choice
from reelquant.engine.components import plan_components
from reelquant.engine.plan import Plan
from reelquant.models.condition import Prompts, fitted, texts_of
from reelquant.models.conditions import check_given, check_texts
from reelquant.models.defaults import required
from reelquant.models.described import described
from reelquant.models.lora import adapter_file
from reelquant.models.pipelines import pipeline_class
from reelquant.models.sampling import folder_notes
from reelquant.recipes.recipe import Recipe
from reelquant.sites import DenoiserMap
from reelquant.stages import Specs
from reelquant.streaming.estimate import Estimate, estimate
from reelquant.streaming.log import digest
from reelquant.streaming.source import Source

WORK = 2  # version of what is kept in the working folder
LARGE = 4  # a text encoder beyond this part of the budget stays on disk, too
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def versions() -> dict[str, str]:
    """Those of the libraries that sample and compute, where they are installed."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _stamp(file: Path) -> list[int]:
    return [file.stat().st_size, file.stat().st_mtime_ns]


def _map_of(name: str, part: nn.Module, recipe: Recipe) -> DenoiserMap:
    """Of a denoiser without weights; one that cannot be probed is outlined where the recipe needs no data."""
    return discover_or_outline(part, stand_in) if recipe.data_free else discover(stand_in(part))


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be done: everything that decides the result.

    Attributes:
        source: the float pipeline.
        plans: what happens to each component, by its name.
        prompts: calibration texts and conditions; None for the pipeline's own.
        call: arguments of the pipeline call during calibration.
        budget: bytes of memory that may be used.
        adapters: file -> scale of what is merged into the float weights first; see :mod:`reelquant.models.lora`.
    """

    source: Source
    plans: Mapping[str, Plan]
    prompts: Prompts | None
    call: Mapping[str, Any]
    budget: int
    adapters: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        source: Source,
        recipes: Mapping[str, Recipe],
        prompts: Prompts | None,
        skip: Sequence[str],
        call: Mapping[str, Any],
        budget: int,
        adapters: Mapping[str, float] | None = None,
    ) -> Job:
        """Plan every component; their parameters stay on the meta device.

        Raises:
            UnsupportedError: for a component that is not a denoiser of the pipeline, or an argument that its call does not take.
        """
        source.check_denoisers(recipes)
        source.check_call(call)
        plans = plan_components(source.pipe, recipes, skip, _map_of)
        return cls(source, plans, prompts, call, budget, adapters or {})

    def check(self) -> None:
        """Refuse stages that need the model in memory, and calls that lack something, before anything is written.

        Raises:
            CalibrationError: for a missing condition.
            UnsupportedError: naming the recipe and the stage; for texts that the pipeline does not take.
        """
        for plan in self.plans.values():
            for entry in plan.entries:
                if entry.stage.in_memory is not None:
                    raise UnsupportedError(
                        f"recipe '{plan.recipe.name}' needs the model in memory, because {entry.stage.in_memory}; or allow more memory"
                    )
        if self.calibrates:
            kind = pipeline_class(self.source.folder)
            check_texts(kind, texts_of(self.prompts or ()))
            call = folder_notes(self.source.folder).get("call", {}) | dict(self.call)
            prompts = fitted(kind, self.prompts or ())
            check_given(kind, call | required(kind, prompts, call), prompts)

    @property
    def calibrates(self) -> bool:
        return any(not plan.recipe.data_free for plan in self.plans.values())

    @property
    def opens(self) -> bool:
        """Whether the pipeline is opened: to sample, or because it knows where adapters belong."""
        return self.calibrates or bool(self.adapters)

    @property
    def offloaded(self) -> list[str]:
        """Text encoders so large that they stay on disk, too."""
        stored, modules = self.source.stored(), self.source.modules
        return [name for name, (library, _) in modules.items() if library == "transformers" and stored[name] > self.budget / LARGE]

    @property
    def resident(self) -> int:
        """Bytes of the components that are in memory as long as the pipeline is open."""
        here = set(self.source.modules) - set(self.source.disks) - set(self.offloaded)
        specs = [spec for name in here for spec in Shards.of(self.source.folder / name).specs.values()]
        return sum(spec.numel for spec in specs) * self.source.dtype.itemsize

    def identity(self) -> dict[str, Any]:
        """What must be the same for an interrupted run to go on."""
        skipped = {name: sorted(row.layer.name for row in plan.skipped) for name, plan in self.plans.items()}
        return {
            "reelquant": __version__,
            "work": WORK,
            **versions(),
            "recipe": {name: plan.recipe.digest() for name, plan in self.plans.items()},
            "layers": digest(skipped),
            "dtype": str(self.source.dtype),
            "device": self.source.device,
            "prompts": digest(described(self.prompts)),
            "call": digest(described(self.call)),
            "adapters": {source: [scale, *_stamp(adapter_file(source)[1])] for source, scale in self.adapters.items()},
            "source": {name: _stamp(file) for name, file in self.source.files().items()},
        }

    def estimate(self) -> Estimate:
        """Time, memory and disk before anything is done."""
        return estimate(self.source.stored(), self.source.disks, self.plans, self.call, self.resident if self.opens else 0)

    @property
    def fits(self) -> bool:
        """Whether the way through memory is open."""
        return self.estimate().in_memory <= self.budget

    def seconds(self, expected: Estimate) -> float:
        """About how long it takes: one layer is loaded and rounded, its times count for all. Samplers and solvers come on top.

        Raises:
            RecipeError: if not even that layer fits.
        """
        expected.check_memory(self.budget)
        name, plan = next(iter(self.plans.items()))
        disk, row = self.source.disks[name], max(plan.quantized, key=lambda row: math.prod(row.layer.shape))
        start = time.perf_counter()
        module = disk.layer(row.layer.name)
        loaded = time.perf_counter()
        alone = replace(row, specs=Specs(row.site.specs.weight), entries=())  # neither data nor a solver
        context = Context(plan, disk.model, {}, (), lambda name: module, draft=True)
        build_layer(context, GroupWork([alone]), alone, Choice.first(plan.entries))
        built = time.perf_counter()
        weights = sum(math.prod(row.layer.shape) for plan in self.plans.values() for row in plan.quantized)
        size = sum(value.numel() * value.element_size() for value in module.parameters())
        moved = expected.moved if expected.in_memory > self.budget else expected.source + expected.result
        return moved * (loaded - start) / size + weights * (built - loaded) / math.prod(row.layer.shape)
