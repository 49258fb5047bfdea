"""Which bits for which card: recipes for the components of a pipeline that fit into a budget of memory, and what each costs."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from reelquant._errors import RecipeError, UnsupportedError
from reelquant._numbers import size
from reelquant._progress import Progress, Silent
from reelquant.kernels import native_float
from reelquant.planning.candidates import DENOISERS, FLOAT, Bench, Candidate
from reelquant.planning.formats import Formats
from reelquant.planning.memory import MODES, between, peak
from reelquant.planning.parts import Part, parts_of
from reelquant.planning.process import process_bytes
from reelquant.planning.quality import NOT_MEASURED, measured
from reelquant.planning.rehearsal import Rehearsal, rehearse
from reelquant.planning.timing import Timings, here
from reelquant.recipes.recipe import Recipe
from reelquant.streaming import Source, parse_bytes

BANDS = {"memory": 0.10, "speed": 0.25}
"""Relative errors of predictions on a CPU, as far off as ``benchmarks/planning.py`` has found them; see benchmarks/results/planning.md."""
WITHOUT_UNIT = 10_000  # bytes: who asks for less has left out the unit
FINEST = 0.01  # bits per weight: budgets of formats by layer are multiples of it
AskFormats = Callable[[Mapping[str, Part]], Formats]
"""Gives, or measures, what formats by layer are chosen by; it is asked if a plan needs them."""
OPTIONS = {"num_frames": "--frames", "height": "--height", "width": "--width", "num_inference_steps": "--steps"}


@dataclass(frozen=True)
class Way:
    """One way to make the clip.

    Attributes:
        recipes: recipe by component, ``float`` for those that stay as they are.
        offload: of :data:`reelquant.planning.memory.MODES`.
        size: bytes of the tensors in the folder.
        peak: most bytes at a time, on the device.
        speed: how many times faster a denoising step is than in float, or why that is not known.
        quality: PSNR of clips to float, or that it was not measured.
        command: what to run.
        own: recipes that are not in the library: YAML by the name of the file that the command reads.
    """

    recipes: dict[str, str]
    offload: str
    size: int
    peak: int
    speed: float | str
    quality: str
    command: str
    own: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """``qvd-w8a8 for transformer, w8a16 for text_encoder``."""
        named = [f"{recipe} for {name}" for name, recipe in self.recipes.items() if recipe != FLOAT]
        return ", ".join(named) or "everything as it is"


@dataclass(frozen=True)
class Planned:
    """What fits.

    Attributes:
        model: the pipeline.
        device, dtype: where it shall run, and the dtype of its float parts.
        budget: bytes.
        clip: frames, height and width; steps: denoising steps.
        calls: of each denoiser in a step.
        components: kind and bytes of every component in float.
        base: bytes of the process itself.
        best: the way to take.
        others: further ways that fit.
        as_it_is: the float pipeline, which may not fit.
        bands: relative errors of the predictions; None where predictions were never held against such a device.
    """

    model: str
    device: str
    dtype: str
    budget: int
    clip: tuple[int, ...]
    steps: int
    calls: dict[str, float]
    components: dict[str, dict[str, Any]]
    base: int
    best: Way
    others: list[Way]
    as_it_is: Way
    bands: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"Planned({self.best.words}: {size(self.best.peak)} of {size(self.budget)})"


def plan_memory(
    model: str | Path,
    max_memory: int | str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    min_speed: float | None = None,
    bits: float | None = None,
    recipes: Sequence[str] | None = None,
    formats: AskFormats | None = None,
    progress: Progress | None = None,
    call: Mapping[str, Any] | None = None,
) -> Planned:
    """Find out which recipes fit into a budget, from config files and headers alone; see :func:`reelquant.plan`."""
    budget = parse_bytes(max_memory)
    if min_speed is not None and not here(device):
        raise UnsupportedError(f"min_speed is measured on the device, and there is no '{device}' on this machine; leave it out")
    return survey(model, device, dtype, bits, recipes, progress, call, formats).within(budget, min_speed)


def survey(
    model: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    bits: float | None = None,
    recipes: Sequence[str] | None = None,
    progress: Progress | None = None,
    call: Mapping[str, Any] | None = None,
    formats: AskFormats | None = None,
) -> Survey:
    """What every component takes with every recipe, whatever the budget is; arguments as in :func:`plan_memory`."""
    here(device)  # an unknown name is an error, an absent device is not
    heard, dtype = progress or Silent(), dtype or native_float(device.partition(":")[0])
    heard.phase("plan", 3)
    source = Source.open(model, dtype)
    heard.advance()
    parts = parts_of(source)
    seen = rehearse(source, parts, call or {})
    base = _base(device, dtype)
    heard.advance()
    bench = Bench(parts, seen, device, lambda scale: rehearse(source, parts, _enlarged(call or {}, seen.clip, scale)), formats)
    every = bench.candidates(recipes, bits)
    heard.advance()
    return Survey(str(model), bench, every, base, dict(call or {}), dtype, heard)


def _enlarged(call: Mapping[str, Any], clip: tuple[int, ...], scale: float) -> dict[str, Any]:
    """Arguments of the call for a clip of other height and width."""
    return {**call, "height": round(scale * clip[-2]), "width": round(scale * clip[-1])}


def _base(device: str, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the process itself, without and with quantized layers; a device of its own holds no libraries."""
    return (process_bytes(dtype, quantized=False), process_bytes(dtype, quantized=True)) if device == "cpu" else (0, 0)


@dataclass(eq=False)
class Survey:
    """What is known of a pipeline before a budget is.

    Attributes:
        model: the pipeline.
        bench: its components and the rehearsed clip.
        every: candidates by slot.
        base: bytes of the process, without and with quantized layers.
        call: arguments of the pipeline call.
        dtype: of the float parts.
        progress: hears of measurements.
    """

    model: str
    bench: Bench
    every: dict[str, list[Candidate]]
    base: tuple[int, int]
    call: dict[str, Any]
    dtype: torch.dtype
    progress: Progress
    _speeds: dict[str, float | str] = field(default_factory=dict)
    _timings: Timings | None = None

    def within(self, budget: int, min_speed: float | None = None) -> Planned:
        """What fits into so many bytes, and is so many times as fast as float.

        Raises:
            RecipeError: if nothing does, with what would.
        """
        ways = self._fast(self._ways(budget), budget, min_speed)
        others = [way for way in ways[1:] if way.recipes != ways[0].recipes or way.offload != ways[0].offload]
        seen = self.seen
        return Planned(
            model=self.model,
            device=self.bench.device,
            dtype=str(self.dtype).removeprefix("torch."),
            budget=budget,
            clip=seen.clip,
            steps=seen.steps,
            calls=seen.calls,
            components={name: self._component(name) for name in self.bench.parts},
            base=self.base[0],
            best=ways[0],
            others=others,
            bands=dict(BANDS) if self.bench.device == "cpu" else dict.fromkeys(BANDS),
            as_it_is=self._way({slot: self.bench.made(slot, None, 0) for slot in self.bench.slots}, "none"),
        )

    def _component(self, name: str) -> dict[str, Any]:
        """A component as its first candidate has it."""
        part = self.bench.parts[name]
        first = next(one.parts[name] for slot in self.every.values() for one in slot[:1] if name in one.parts)
        return {"kind": part.kind, "bytes": part.bytes, "running": first.running}

    @property
    def seen(self) -> Rehearsal:
        return self.bench.seen

    @property
    def modes(self) -> tuple[str, ...]:
        """On a CPU there is nowhere to move components to."""
        return MODES[:1] if self.bench.device == "cpu" else MODES

    def _ways(self, budget: int) -> list[Way]:
        """Those that fit, the best first."""
        fitting = self._fitting(budget)
        if not fitting and not self._by_layer:
            fitting = self._by_bits(budget)
        if not fitting:
            raise RecipeError(self._nothing(budget))
        return [self._way(chosen, mode) for chosen, mode in fitting]

    @property
    def _by_layer(self) -> bool:
        """Whether the denoisers get formats by layer anyway."""
        return any(one.own for one in self.every[DENOISERS])

    def _fast(self, ways: list[Way], budget: int, least: float | None) -> list[Way]:
        """Those that are fast enough."""
        fast = [way for way in ways if least is None or (isinstance(way.speed, float) and way.speed >= least)]
        if not fast:
            best = max((way.speed for way in ways if isinstance(way.speed, float)), default=None)
            told = "no speed is known of what fits" if best is None else f"the fastest that fits is {best:.2f} times as fast as float"
            raise RecipeError(f"nothing that fits into {size(budget)} is {least:g} times as fast: {told}; ask for less")
        return fast

    def _fitting(self, budget: int) -> list[tuple[dict[str, Candidate], str]]:
        """For each offloading and recipe of the denoisers, the least quantized other components with which it fits."""
        found, every, known = [], self.every, set[tuple[str, ...]]()
        others = [slot for slot in every if slot != DENOISERS]
        products = sorted(itertools.product(*(every[slot] for slot in others)), key=lambda some: sum(one.rank for one in some))
        for mode in self.modes:
            for first in every[DENOISERS]:
                for rest in products:
                    chosen = {DENOISERS: first} | dict(zip(others, rest, strict=True))
                    if self._peak(chosen, mode) > budget:
                        continue
                    names = tuple(one.name for one in chosen.values())
                    if names not in known:  # with less offloading, that is
                        found.append((chosen, mode))
                    known.add(names)
                    break
        return found

    def _by_bits(self, budget: int) -> list[tuple[dict[str, Candidate], str]]:
        """Formats by layer for the denoisers, as many bits as fit beside everything else, other components as small as they get."""
        rough = self.bench.smallest()
        if all(self._smallest(rough, mode)[1] > budget for mode in self.modes):
            return []
        least, most = self.bench.formats.reach
        low, high = self.bench.allocated(least), self.bench.allocated(most)
        for mode in self.modes:
            if self._smallest(low, mode)[1] > budget:
                continue
            share = _largest(lambda share, mode=mode: self._smallest(_between(low, high, share), mode)[1] <= budget)
            bits = max(math.floor((least + share * (most - least)) / FINEST) * FINEST, least)
            chosen = self._smallest(self.bench.allocated(bits), mode)
            while chosen[1] > budget and bits > least:  # what lies between two allocations is a straight line only nearly
                bits = max(bits - FINEST, least)
                chosen = self._smallest(self.bench.allocated(bits), mode)
            return [(chosen[0], mode)]
        return []

    def _smallest(self, first: Candidate, mode: str) -> tuple[dict[str, Candidate], int]:
        """The smallest other components beside a candidate, and the peak."""
        chosen = {slot: min(some, key=lambda one: sum(part.weights for part in one.parts.values())) for slot, some in self.every.items()}
        chosen[DENOISERS] = first
        return chosen, self._peak(chosen, mode)

    def _nothing(self, budget: int) -> str:
        firsts = [*self.every[DENOISERS], *([] if self._by_layer else [self.bench.smallest()])]
        least, mode, first = min(
            ((self._smallest(first, mode)[1], mode, first) for first in firsts for mode in self.modes), key=lambda found: found[0]
        )
        needs = f" with {mode} offload" if mode != "none" else ""
        clip = "x".join(map(str, self.seen.clip))
        unit = " (a number without a unit is bytes)" if budget < WITHOUT_UNIT else ""
        return (
            f"--max-memory {size(budget)}{unit} is too little for '{self.model}' at {clip}: the smallest way, {first.name}{needs}, takes "
            f"{size(least)}; allow --max-memory {_enough(least)}, or make shorter or smaller clips"
        )

    def _peak(self, chosen: Mapping[str, Candidate], mode: str) -> int:
        base = self.base[any(one.recipe is not None for one in chosen.values())]
        last, clip = chosen[DENOISERS].last, self.seen.clip
        if last != 1 and clip:  # what comes after the denoisers sees another size
            clip = (clip[0], round(last * clip[-2]), round(last * clip[-1]))
            chosen = {slot: one if slot == DENOISERS else self.bench.resized(one, last) for slot, one in chosen.items()}
        return peak({name: one for slot in chosen.values() for name, one in slot.parts.items()}, base, clip, mode)

    def _way(self, chosen: Mapping[str, Candidate], mode: str) -> Way:
        by_part = {name: one for one in chosen.values() for name in one.parts}
        order = [name for name in self.bench.parts if name in by_part]
        first = chosen[DENOISERS]
        told = measured(self.model, first.name)
        quality = "float" if first.recipe is None else NOT_MEASURED if told is None else str(told)
        return Way(
            recipes={name: by_part[name].name for name in order},
            offload=mode,
            size=sum(part.stored for one in chosen.values() for part in one.parts.values()),
            peak=self._peak(chosen, mode),
            speed=self._speed(first),
            quality=quality,
            command=self._command({name: by_part[name] for name in order}),
            own={file: recipe_yaml(first.own[name]) for name, file in files_of(first).items()},
        )

    def _speed(self, first: Candidate) -> float | str:
        if first.name not in self._speeds:
            self._speeds[first.name] = self._measured(first)
        return self._speeds[first.name]

    def _measured(self, first: Candidate) -> float | str:
        if first.recipe is None:
            return 1.0
        if not here(self.bench.device):
            return "not measured here"
        self._timings = self._timings or Timings(self.bench.device)
        mine = self.bench.step_seconds(first, self._timings, self.progress)
        if mine is None:
            return "depends on the formats"
        usual = self.bench.step_seconds(self.bench.made(DENOISERS, None, 0), self._timings, self.progress)
        assert usual is not None
        return usual / mine

    def _command(self, by_part: Mapping[str, Candidate]) -> str:
        """The command that makes it; recipes of our own lie in the files of :func:`files_of`."""
        chosen = {name: one for name, one in by_part.items() if one.recipe is not None}
        dtype = [] if self.dtype == torch.float32 else ["--dtype", str(self.dtype).removeprefix("torch.")]
        sizes = [word for name, option in OPTIONS.items() if name in self.call for word in (option, str(self.call[name]))]
        if not chosen:
            return shlex.join(["reelquant", "generate", self.model, "-p", "...", *sizes, *dtype, "-o", "clip.mp4"])
        names = {name: files_of(one).get(name, one.name) for name, one in chosen.items()}
        alone = set(chosen) == {part.name for part in self.bench.slots[DENOISERS]} and len(chosen) == 1
        recipes = [word for name, recipe in names.items() for word in ("-r", recipe if alone else f"{name}={recipe}")]
        calibrates = any(one.recipe is not None and not one.recipe.data_free for one in chosen.values())
        return shlex.join(["reelquant", "quantize", self.model, *recipes, *(sizes if calibrates else []), *dtype, "-o", "out"])


def _enough(least: int) -> str:
    """An amount of memory as ``--max-memory`` reads it, rounded up."""
    return f"{-(-least // 10**6)}MB" if least < 10**9 else f"{-(-least // 10**7) / 100:.2f}GB"


def _largest(fits: Callable[[float], bool], rounds: int = 30) -> float:
    """The largest share between 0, which fits, and 1 that fits."""
    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _between(low: Candidate, high: Candidate, share: float) -> Candidate:
    """A candidate whose formats lie between those of two others."""
    return replace(low, parts={name: between(one, high.parts[name], share) for name, one in low.parts.items()})


def files_of(candidate: Candidate) -> dict[str, str]:
    """The file of each component's recipe that is not in the library: one if all are the same."""
    texts = {name: recipe_yaml(recipe) for name, recipe in candidate.own.items()}
    alone = len(set(texts.values())) == 1
    return {name: "recipe.yaml" if alone else f"recipe-{name}.yaml" for name in texts}


def recipe_yaml(recipe: Recipe) -> str:
    """A recipe as ``reelquant quantize -r`` reads it."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
