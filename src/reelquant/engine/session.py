"""One component's quantization in progress: what was observed, what was chosen, and the model between float and quantized."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._progress import Progress
from reelquant.clock import Clock, Pairs
from reelquant.discover import TIMED, kind_of_component
from reelquant.engine.build import BuiltGroup, Context, build_group, folded
from reelquant.engine.calibration import STEPS, Calibration, Expected
from reelquant.engine.choice import Choice
from reelquant.engine.components import Measure
from reelquant.engine.plan import Plan
from reelquant.engine.recorded import again
from reelquant.engine.recorder import Recorder
from reelquant.engine.report import Report
from reelquant.engine.search import Assignment, family, trial_count
from reelquant.engine.store import Store
from reelquant.engine.texts import HELD_OUT_SEED, Texts, divided
from reelquant.formats.criteria import mean_and_worst
from reelquant.models.condition import Condition, Prompts
from reelquant.models.conditions import at_once, check_given
from reelquant.models.described import described
from reelquant.models.sampling import call_arguments, sample
from reelquant.nn import get_module, set_module
from reelquant.observe import InputStatistics, RecordedCall
from reelquant.recipes.entry import Entry
from reelquant.recipes.recipe import Recipe
from reelquant.sites import DenoiserMap, Group
from reelquant.stages import Specs


@dataclass(eq=False)
class Session:
    """A :class:`reelquant.stages.ModelWork`: what stages see of a whole model.

    Float layers are kept in ``floats`` until the end, so that candidates can be compared and a failed run leaves the pipeline as it
    was.

    Attributes:
        denoiser: the component's module, also where it is a text encoder or VAE.
        texts: those of calibration; for components that do not denoise, those that they are measured on.
        held_out: the texts that choices and the final check are made on, see :func:`reelquant.engine.texts.divided`.
        sampled: timesteps of the whole sampler, of which a denoiser may see a part.
        measure, decode: figures of a component that does not denoise, once it is quantized: of made-up inputs, and of the held-out clips.
        references: final latents of the float pipeline, by what they were sampled with.
        begun: what gives those that have been begun.
        undos: what a failed run has to undo, first done first.
    """

    pipe: Any
    component: str
    denoiser: nn.Module
    plan: Plan
    store: Store
    progress: Progress
    arguments: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    texts: Texts = field(default_factory=lambda: Texts([], []))
    held_out: list[str | Condition] = field(default_factory=list)
    measure: Measure = dict
    decode: Measure = dict
    calibration: Calibration | None = None
    references: dict[str, Tensor] = field(default_factory=dict)
    begun: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    clock: Clock | None = None
    sampled: list[float] = field(default_factory=list)
    floats: dict[str, nn.Module] = field(default_factory=dict)
    norms: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    undos: list[Callable[[], object]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    report: Report = field(init=False)

    # --- what is known --------------------------------------------------------------------------------------------------------

    @property
    def recipe(self) -> Recipe:
        """The recipe that the plan follows."""
        return self.plan.recipe

    @property
    def map(self) -> DenoiserMap:
        """What discovery knows of the component."""
        return self.plan.map

    @property
    def denoises(self) -> bool:
        """Whether the component is called with a timestep; an encoder or VAE is not."""
        return kind_of_component(self.component, self.denoiser) in TIMED

    @property
    def decodes(self) -> bool:
        """Whether the component is a VAE: what it makes of latents is compared, and not the latents."""
        return kind_of_component(self.component, self.denoiser) == "vae"

    @property
    def groups(self) -> list[Group]:
        """Groups with at least one quantized layer."""
        rows = self.plan.layers
        return [group for group in self.map.groups if any(rows[name].skipped is None for name in group.layers)]

    @property
    def timesteps(self) -> list[float]:
        """Timesteps of calibration, in sampling order."""
        return self.calibration.steps.timesteps if self.calibration else []

    @property
    def guidance(self) -> Pairs | None:
        """How guidance calls came during calibration."""
        return self.calibration.pairs if self.calibration else None

    @property
    def halves(self) -> bool:
        """Whether calibration told the halves of guidance apart."""
        return self.calibration is not None and any(self.calibration.steps.halves)

    @property
    def device(self) -> str | None:
        """Type of device where the sampler runs."""
        return self.store.device

    @property
    def calls(self) -> Sequence[RecordedCall]:
        """Recorded calls of the float denoiser."""
        return self.calibration.calls if self.calibration else []

    def output(self, call: RecordedCall) -> Any:
        """What the denoiser as it is now gives for a recorded call."""
        return again(self.denoiser, call)

    @property
    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the first call that calibration saw."""
        example = self.calibration.steps.example if self.calibration else None
        return example or ((), {})

    @property
    def specs(self) -> dict[str, Specs]:
        """Numbers of the layers that are going to be quantized."""
        return {row.layer.name: row.site.specs for row in self.plan.quantized}

    def touched(self, stage: object) -> list[str]:
        """The layers that are going to be quantized and that the stage touches."""
        return self.plan.touched(self._entry(stage))

    def name_of(self, stage: object) -> str:
        """What the recipe calls this stage."""
        return self._entry(stage).name

    def _entry(self, stage: object) -> Entry:
        return next(entry for entry in self.plan.entries if entry.stage is stage)

    def statistics(self, name: str) -> InputStatistics:
        """What was observed of a layer's input."""
        assert self.calibration is not None
        return self.calibration.inputs[name]

    def float_layer(self, name: str) -> nn.Module:
        """A float layer with its tensors in memory."""
        return self.floats[name] if name in self.floats else self.store.float_layer(name)

    def quantized(self) -> dict[str, Any]:
        """The quantized layers that are in the model."""
        return {name: get_module(self.denoiser, name) for name in self.floats}

    def layer_bytes(self, name: str, specs: Specs) -> int:
        """An estimate of the storage of a layer with these numbers."""
        return self.plan.layers[name].with_specs(specs).bytes_after

    # --- sampling -------------------------------------------------------------------------------------------------------------

    @contextmanager
    def timed(self, phase: str, total: int) -> Iterator[None]:
        """Announce a phase and take its time."""
        self.progress.phase(phase, total)
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def advance(self) -> None:
        """One unit of progress."""
        self.progress.advance()

    def begin(self, prompts: Prompts, overrides: dict[str, Any]) -> None:
        """Divide the texts, and settle the pipeline call: its own arguments, then the recipe's steps, then ``overrides``."""
        wanted = self.recipe.calibrate
        if wanted is None:
            self.texts = Texts(list(prompts), [])
            return
        self.arguments = call_arguments(self.pipe, **overrides)
        self.seed = wanted.seed
        self.texts, self.held_out = divided(self.pipe, prompts, wanted, self.recipe.search.prompts, self.arguments)
        check_given(type(self.pipe), self.arguments, [*self.texts.written, *self.held_out])
        if wanted.steps is not None and overrides.get("num_inference_steps") is None:
            self.arguments["num_inference_steps"] = wanted.steps

    @property
    def steps(self) -> int:
        """Denoising steps of a full run."""
        return self.arguments.get("num_inference_steps") or STEPS

    def sampled_calls(self, clips: int, calls: int) -> Sequence[RecordedCall]:
        """Recorded calls of the denoiser as it is now, evenly over a run of the first texts of calibration."""
        recorder = self.recorded("first calls", self.texts.written[:clips], calls, halves=True)
        return recorder.recording(sorted(set(recorder.timesteps), reverse=True))

    def recorded(self, phase: str, texts: Prompts, calls: int, *content: Any, halves: bool) -> Recorder:
        """Sample these texts of calibration by the pipeline as it is now, and record so many calls of the denoiser."""
        assert self.recipe.calibrate is not None
        batch = at_once(type(self.pipe), self.arguments, self.recipe.calibrate.batch, texts)
        expected = Expected.of(len(texts), batch, self.arguments)
        options = {"batch": batch, "output": "latent", "on_step": self.advance} | self.arguments

        def run() -> Recorder:
            recorder = Recorder.of(self.denoiser, self.plan, calls, expected.calls, halves=halves)
            with recorder.watching(self.denoiser):
                sample(self.pipe, texts, seed=self.seed, first=0, **options)
            return recorder

        with self.timed(f"sample for {phase}", expected.calls):
            return self.store.begun("resampled", run, *content)()

    def held_out_frames(self) -> Tensor:
        """The held-out clips by the pipeline as it is now, decoded; of one size, as the float ones are."""
        first = len(self.texts.written) + len(self.texts.probes)
        options = {"on_step": self.progress.advance} | self.arguments
        return sample(self.pipe, self.held_out, seed=self.seed + HELD_OUT_SEED, first=first, one_size=True, **options)

    def held_out_latents(self, **overrides: Any) -> Tensor:
        """Final latents of the held-out clips by the pipeline as it is now; of one size, as the float ones are."""
        return self._begun_latents(**overrides)()

    def _begun_latents(self, **overrides: Any) -> Callable[[], Tensor]:
        arguments = {"on_step": self.progress.advance} | self.arguments | overrides
        bits = self.clock.bits if self.clock else []
        first = len(self.texts.written) + len(self.texts.probes)  # conditions go on where calibration left off
        options = {"seed": self.seed + HELD_OUT_SEED, "first": first, "output": "latent", "one_size": True} | arguments
        content = arguments.get("num_inference_steps"), bits
        return self.store.begun("sampled", lambda: sample(self.pipe, self.held_out, **options), *content)

    def begin_float_latents(self, **overrides: Any) -> None:
        """Sample the same by the float pipeline, once for all recipes that share a calibration, before anything is changed."""
        key = self._reference(overrides)
        if key not in self.references and key not in self.begun:
            self.begun[key] = self._begun_latents(**overrides)

    def end_float_latents(self) -> None:
        """Take what was begun; until then processes that share the sampling go on with something else."""
        while self.begun:
            key, result = self.begun.popitem()
            self.references[key] = result()

    def float_latents(self, **overrides: Any) -> Tensor:
        """Final latents of the held-out clips by the float pipeline."""
        self.begin_float_latents(**overrides)
        self.end_float_latents()
        return self.references[self._reference(overrides)]

    def _reference(self, overrides: Mapping[str, Any]) -> str:
        steps = overrides.get("num_inference_steps")
        return repr((described(self.held_out), self.seed, sorted(described(self.arguments).items()), steps))

    @property
    def trials(self) -> int:
        """How many candidates will be sampled."""
        return 0 if self.recipe.data_free else trial_count(self.plan, self.groups)

    @property
    def trial_arguments(self) -> dict[str, Any]:
        """What trials sample with instead."""
        return {"num_inference_steps": self.recipe.search.steps, "on_step": None}

    def trial(self, assignment: Assignment, reference: Tensor) -> float:
        """How near a candidate comes to the float latents, the mean of all clips and the worst one, in dB."""

        def sampled() -> float:
            self.install([self.build(group, assignment[family(group)], draft=True) for group in self.groups])
            try:
                return mean_and_worst(reference, self.held_out_latents(**self.trial_arguments))
            finally:
                self.restore()

        rows = self.plan.quantized
        return self.store.score([(name, choice.digest(rows)) for name, choice in assignment.items()], sampled)

    # --- between float and quantized ------------------------------------------------------------------------------------------

    def context(self, *, draft: bool = False, folding: bool = True) -> Context:
        """What building layers takes."""
        inputs = self.calibration.inputs if self.calibration else {}
        return Context(self.plan, self.denoiser, inputs, self.timesteps, self.float_layer, draft, folding)

    def build(self, group: Group, choice: Choice, *, draft: bool = False) -> BuiltGroup:
        """The replacements of a group for this choice."""
        return self.store.group(self.context(draft=draft), group, choice)

    def install(self, groups: Sequence[BuiltGroup]) -> None:
        """Swap the layers of these groups in; what was float is remembered."""
        for built in groups:
            for name, layer in built.layers.items():
                self._swap(name, layer)
            self._fold(built)
            self.store.installed(built)

    def _swap(self, name: str, layer: Any) -> None:
        self.floats.setdefault(name, get_module(self.denoiser, name))
        layer.follow(self.clock, name)
        set_module(self.denoiser, name, layer)

    def _fold(self, built: BuiltGroup) -> None:
        """Move a rewrite into the affine norm that produces the input: ``gamma / s``, ``(beta - z) / s``."""
        producer = built.group.producer
        if built.fold is None or producer is None:
            return
        norm = get_module(self.denoiser, producer)
        self.norms.setdefault(producer, {name: p.detach().clone() for name, p in norm.named_parameters(recurse=False)})
        with torch.no_grad():
            for name, value in folded(self.norms[producer], built.fold).items():
                getattr(norm, name).copy_(value)

    def restore(self) -> None:
        """Put every float layer and norm back."""
        for name, module in self.floats.items():
            set_module(self.denoiser, name, module)
        for name, values in self.norms.items():
            with torch.no_grad():
                for key, value in values.items():
                    getattr(get_module(self.denoiser, name), key).copy_(value)
        self.floats, self.norms = {}, {}
        self.store.removed()

    @contextmanager
    def having(self, groups: Sequence[BuiltGroup]) -> Iterator[None]:
        """Inside, these groups are quantized, and all others are float."""
        self.install(groups)
        try:
            yield
        finally:
            self.restore()

    @contextmanager
    def drafted(self, specs: Mapping[str, Specs]) -> Iterator[None]:
        """Inside, these layers are quantized with these numbers, rounded to nearest, and all others are float."""
        plan = self.plan.with_specs(specs)
        context = Context(plan, self.denoiser, self.context().inputs, self.timesteps, self.float_layer, True, False)
        choice = Choice.first(plan.entries)
        touched = [group for group in self.groups if any(name in specs for name in group.layers)]
        for group in touched:
            for name, layer in build_group(context, group, choice).layers.items():
                if name in specs:
                    self._swap(name, layer)
        try:
            yield
        finally:
            self.restore()

    def undo(self, action: Callable[[], object]) -> None:
        """Call this if the run fails."""
        self.undos.append(action)

    def roll_back(self) -> None:
        """Leave the pipeline as it was before the run."""
        self.restore()
        while self.undos:
            self.undos.pop()()

    def commit(self) -> None:
        """The run succeeded: let the float layers go."""
        self.floats, self.norms, self.undos = {}, {}, []
