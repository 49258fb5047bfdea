"""From a float pipeline to a quantized one: discover, plan, observe, choose, build, install, check."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._errors import CalibrationError
from reelquant._progress import Progress, Silent
from reelquant.clock import Clock
from reelquant.discover import denoiser_of, discover
from reelquant.models.sampling import call_arguments, sample
from reelquant.nn import KernelFacts, QuantLayer, get_module, kernels_of, set_module, start_clock, start_runtime, stop_clock
from reelquant.recipes.build import BuiltGroup, Options, build_group, folded, layer_bytes
from reelquant.recipes.calibration import Calibration, calibrate
from reelquant.recipes.plan import Plan, make_plan
from reelquant.recipes.recipe import Recipe
from reelquant.recipes.report import Report
from reelquant.recipes.search import Assignment, choose, family, latent_psnr, trial_count
from reelquant.reuse import add_table, drop_unused
from reelquant.sites import Group

HELD_OUT_SEED = 100_000  # held-out clips never start from the noise of a calibration clip


@dataclass(eq=False)
class Session:
    """One quantization in progress: the pipeline, the plan, and what was observed.

    Float layers are kept in ``floats`` until the end, so that candidates can be compared and a failed run leaves the pipeline as it was.
    ``held_out`` are the texts that choices and the final check are made on: not those of calibration, or at least with other seeds.
    """

    pipe: Any
    component: str
    denoiser: nn.Module
    plan: Plan
    progress: Progress
    arguments: dict[str, Any]
    seed: int
    calibration: Calibration | None = None
    held_out: list[str] = field(default_factory=list)
    clock: tuple[Clock, ...] = ()
    floats: dict[str, nn.Module] = field(default_factory=dict)
    norms: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    drafts: dict[tuple[str, str], BuiltGroup] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def groups(self) -> list[Group]:
        """Groups with at least one quantized layer."""
        return [group for group in self.plan.map.groups if any(self.plan.layers[name].kept is None for name in group.layers)]

    @contextmanager
    def timed(self, phase: str, total: int) -> Iterator[None]:
        """Announce a phase and take its time."""
        self.progress.phase(phase, total)
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def call_with(self, **overrides: Any) -> None:
        """Arguments of the pipeline call: the pipeline's own, then the recipe's steps, then ``overrides``."""
        recipe = self.plan.recipe
        self.arguments = call_arguments(self.pipe, **overrides)
        if recipe.calibrate is not None:
            self.seed = recipe.calibrate.seed
            if recipe.calibrate.steps is not None and overrides.get("num_inference_steps") is None:
                self.arguments["num_inference_steps"] = recipe.calibrate.steps

    @property
    def steps(self) -> int:
        """Denoising steps of a full run."""
        return self.arguments.get("num_inference_steps") or 50

    def held_out_latents(self, **overrides: Any) -> Tensor:
        """Final latents of the held-out clips by the pipeline as it is now."""
        arguments = {"on_step": self.progress.advance} | self.arguments | overrides
        return sample(self.pipe, self.held_out, seed=self.seed + HELD_OUT_SEED, output="latent", **arguments)

    def float_latents(self, **overrides: Any) -> Tensor:
        """The same by the float pipeline; sampled once for all recipes that share a calibration."""
        assert self.calibration is not None and not self.floats
        key = repr((self.held_out, self.seed, sorted(self.arguments.items()), overrides.get("num_inference_steps")))
        if key not in self.calibration.references:
            self.calibration.references[key] = self.held_out_latents(**overrides)
        return self.calibration.references[key]

    @property
    def timesteps(self) -> list[float]:
        return self.calibration.steps.timesteps if self.calibration else []

    def build(self, group: Group, options: Options, *, draft: bool = False) -> BuiltGroup:
        """The replacement of a group for these options."""
        inputs = self.calibration.inputs if self.calibration else {}
        return build_group(self.plan, group, self.denoiser, inputs, options, self.timesteps, draft=draft)

    def draft(self, group: Group, options: Options) -> BuiltGroup:
        """A replacement for a trial, its weights rounded to nearest: solvers would take most of a search's time. Built once."""
        steps = {number for name in group.layers for number in self.plan.layers[name].steps}
        key = (group.name, repr(sorted((number, values) for number, values in options.items() if number in steps)))
        if key not in self.drafts:
            self.drafts[key] = self.build(group, options, draft=True)
        return self.drafts[key]

    def install(self, assignment: Assignment, make: Callable[[Group, Options], BuiltGroup]) -> list[BuiltGroup]:
        """Swap what ``make`` gives for every group in; what was float is remembered."""
        chosen = [make(group, assignment[family(group)]) for group in self.groups]
        for built in chosen:
            for name, layer in built.layers.items():
                self.floats.setdefault(name, get_module(self.denoiser, name))
                layer.clock = self.clock
                set_module(self.denoiser, name, layer)
            self._fold(built)
        return chosen

    def _fold(self, built: BuiltGroup) -> None:
        """Move a rewrite into the affine norm that produces the input: ``gamma / s``, ``(beta - z) / s``."""
        if built.fold is None or built.group.producer is None:
            return
        norm = get_module(self.denoiser, built.group.producer)
        self.norms.setdefault(built.group.producer, {name: p.detach().clone() for name, p in norm.named_parameters(recurse=False)})
        with torch.no_grad():
            for name, value in folded(self.norms[built.group.producer], built.fold).items():
                getattr(norm, name).copy_(value)

    def observe(self, prompts: Sequence[str]) -> Calibration:
        """One sampling pass of the float pipeline, with statistics of what the plan's layers read."""
        return calibrate(
            self.pipe, self.denoiser, self.plan, prompts, seed=self.seed, arguments=self.arguments, on_step=self.progress.advance
        )

    def trial(self, assignment: Assignment, reference: Tensor, **steps: Any) -> float:
        """How near a candidate comes to the float latents, in dB."""
        self.install(assignment, self.draft)
        try:
            return latent_psnr(reference, self.held_out_latents(**steps))
        finally:
            self.restore()

    def kernels(self) -> KernelFacts:
        """What computes the installed layers."""
        return kernels_of(self.denoiser)

    def restore(self) -> None:
        """Put every float layer and norm back."""
        for name, module in self.floats.items():
            set_module(self.denoiser, name, module)
        for name, values in self.norms.items():
            with torch.no_grad():
                for key, value in values.items():
                    getattr(get_module(self.denoiser, name), key).copy_(value)
        self.floats, self.norms = {}, {}


def quantize_pipeline(
    pipe: Any,
    recipe: Recipe,
    prompts: Sequence[str] | None = None,
    *,
    skip: Sequence[str] = (),
    progress: Progress | None = None,
    calibration: Calibration | None = None,
    **overrides: Any,
) -> tuple[Report, Calibration | None]:
    """Quantize a pipeline's denoiser in place.

    Args:
        pipe: a diffusers pipeline in float.
        recipe: what to do.
        prompts: texts; the recipe says how many calibrate, those after them are held out to make choices and for the final check.
        skip: further patterns of layers to keep float.
        progress: hears how far the run is.
        calibration: statistics of an earlier run on the same float model; used if they hold what this recipe needs.
        overrides: arguments of the pipeline call during calibration (``num_inference_steps``, ``num_frames`` ...).

    Returns:
        The report, and the calibration for further recipes on the same float model.

    Raises:
        ReelQuantError: and the pipeline is as it was.
    """
    component, denoiser = denoiser_of(pipe)
    session = Session(pipe, component, denoiser, _plan(recipe, denoiser, skip), progress or Silent(), {}, 0)
    session.call_with(**overrides)
    _check_weights(session)
    try:
        gather(session, prompts, calibration)
        report = settle(session)
        session.floats, session.norms = {}, {}
        start_runtime(denoiser)
        return report, session.calibration
    except BaseException:
        stop_clock(denoiser)
        session.restore()
        raise


def _plan(recipe: Recipe, denoiser: nn.Module, skip: Sequence[str]) -> Plan:
    return make_plan(recipe, discover(denoiser), denoiser, skip)


def _check_weights(session: Session) -> None:
    """Refuse broken weights before anything is sampled; a layer that stays float would break the clips just as well."""
    for name in session.plan.layers:
        for part, value in get_module(session.denoiser, name).named_parameters(recurse=False):
            if not bool(value.isfinite().all()):
                raise CalibrationError(f"the {part} of layer '{name}' holds NaN or inf; the checkpoint is damaged or overflowed in float16")


def gather(session: Session, prompts: Sequence[str] | None, calibration: Calibration | None = None) -> None:
    """Part the prompts into those that calibrate and those held out, and calibrate."""
    recipe = session.plan.recipe
    if recipe.calibrate is None:
        return
    texts = list(prompts or [])
    session.held_out = (texts[recipe.calibrate.prompts :] or texts)[: recipe.search.prompts]
    if calibration is not None and calibration.suffices(session.plan):
        session.calibration = calibration
        return
    chosen = texts[: recipe.calibrate.prompts]
    if not chosen:
        raise CalibrationError(f"recipe '{recipe.name}' calibrates on {recipe.calibrate.prompts} prompts and got none; pass prompts=[...]")
    runs = -(-len(chosen) // recipe.calibrate.batch)
    with session.timed("calibrate", session.steps * runs):
        session.calibration = session.observe(chosen)


def settle(session: Session) -> Report:
    """Choose, build, install and check."""
    recipe = session.plan.recipe
    before = _model_bytes(session.denoiser)
    reference = None
    if session.calibration is not None:
        with session.timed("float reference", session.steps):
            reference = session.float_latents()
    _start_clock(session)  # candidates with per-step scales need it as much as the final layers do
    assignment, trials = _search(session)
    with session.timed("build", len(session.groups)):
        chosen = session.install(assignment, lambda group, options: _solved(session, group, options))
    report = Report(recipe.name, recipe.digest(), type(session.denoiser).__name__, session.component)
    report.layers = [record for built in chosen for record in built.records]
    report.trials, report.timesteps, report.seed = trials, session.timesteps, session.seed
    if recipe.temporal == "table":
        _tables(session, report)
    _check(session, report, reference)
    _account(session, report, before)
    return report


def _solved(session: Session, group: Group, options: Options) -> BuiltGroup:
    built = session.build(group, options)
    session.progress.advance()
    return built


def _search(session: Session) -> tuple[Assignment, list[Any]]:
    groups, search = session.groups, session.plan.recipe.search
    total = trial_count(session.plan, groups)
    if not total or session.calibration is None:
        return choose(session.plan, groups, lambda assignment: 0.0)
    steps = {"num_inference_steps": search.steps, "on_step": None}
    with session.timed("search", total):
        reference = session.float_latents(**steps)

        def evaluate(assignment: Assignment) -> float:
            psnr = session.trial(assignment, reference, **steps)
            session.progress.advance()
            return psnr

        found = choose(session.plan, groups, evaluate)
        session.drafts = {}
        return found


def _start_clock(session: Session) -> None:
    """Per-step scales and tables follow the denoiser's timestep."""
    argument = session.plan.map.timestep_argument
    if not session.timesteps or argument is None:
        return
    session.clock = (Clock(session.timesteps),)
    start_clock(session.denoiser, session.clock[0], argument)


def _tables(session: Session, report: Report) -> None:
    """Store exact outputs of temporal layers, as far as they depend on the timestep alone."""
    assert session.calibration is not None
    layers: dict[str, QuantLayer] = {}
    for name, module in session.floats.items():
        statistics = session.calibration.inputs[name]
        row = session.plan.layers[name].layer
        if row.role != "temporal" or statistics.features is None:
            continue
        if statistics.features.varies:
            report.warnings.append(f"'{name}' has no table: its input depends on more than the timestep ({', '.join(sorted(row.depends))})")
            continue
        if len(statistics.range.seen) != len(session.timesteps):
            report.warnings.append(f"'{name}' has no table: it does not run at every step")
            continue
        layer = get_module(session.denoiser, name)
        assert isinstance(layer, QuantLayer)
        add_table(layer, module, statistics.features.features)
        layers[name] = layer
    args, kwargs = session.calibration.steps.example or ((), {})

    def output() -> Tensor:
        result = session.denoiser(*args, **kwargs)
        return result[0] if isinstance(result, tuple) else result.sample

    drop_unused(layers, output)


def _check(session: Session, report: Report, reference: Tensor | None) -> None:
    """Sample the held-out prompts end to end: finite, and how far from float."""
    if session.calibration is None or reference is None:
        return
    with session.timed("check", session.steps):
        latents = session.held_out_latents()
    if not bool(latents.isfinite().all()):
        raise CalibrationError(
            f"the quantized pipeline ({report.recipe}) gives NaN or inf; try a recipe with more bits or float inputs (w8a16)"
        )
    report.latent_psnr = latent_psnr(reference, latents)
    report.prompts = list(session.calibration.prompts)


def _account(session: Session, report: Report, before: int) -> None:
    """Sizes, kernels, reasons and versions."""
    layers = {record.name: get_module(session.denoiser, record.name) for record in report.layers}
    tables = {
        name: layer.output_table.numel() * 4 for name, layer in layers.items() if isinstance(getattr(layer, "output_table", None), Tensor)
    }
    report.bytes_float = sum(record.bytes_before for record in report.layers)
    report.bytes_tables = sum(tables.values())
    report.bytes_quantized = sum(layer_bytes(layer) for layer in layers.values()) - report.bytes_tables
    report.bytes_model_float, report.bytes_model = before, _model_bytes(session.denoiser)
    facts = session.kernels()
    report.kernel, report.simulated = facts.names, facts.simulated
    for row in session.plan.kept:
        report.kept.setdefault(row.kept or "", []).append(row.layer.name)
    report.seconds = session.seconds
    report.versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    replaced = [record.name for record in report.layers if record.replaced]
    if replaced:
        report.warnings.append(f"{len(replaced)} layers keep nearest rounding: their solver lost to it on its own objective")


def _model_bytes(denoiser: nn.Module) -> int:
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)
