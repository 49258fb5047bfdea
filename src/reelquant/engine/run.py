"""From a float pipeline to a quantized one: discover, plan, observe, choose, build, install, check."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reelquant._errors import CalibrationError, UnsupportedError
from reelquant._progress import Progress, Silent
from reelquant.clock import Clock
from reelquant.discover import component_of, denoiser_of, kind_of_component
from reelquant.engine.build import BuiltGroup, Options, build_group, folded, layer_bytes, model_bytes
from reelquant.engine.calibration import Calibration, Part, calibrate_together
from reelquant.engine.components import Measure, plan_components, start_measuring
from reelquant.engine.plan import Plan
from reelquant.engine.protect import measure_steps, slots_of
from reelquant.engine.report import Report, total
from reelquant.engine.search import Assignment, choose, family, latent_psnr, trial_count
from reelquant.models.sampling import call_arguments, sample
from reelquant.nn import (
    AttentionFacts,
    KernelFacts,
    QuantLayer,
    attention_facts,
    get_module,
    kernels_of,
    round_attention,
    set_module,
    start_clock,
    start_runtime,
    stop_attention,
    stop_clock,
)
from reelquant.recipes.recipe import Recipe
from reelquant.reuse import add_table, drop_unused
from reelquant.sites import Group

if TYPE_CHECKING:
    from reelquant.streaming.journal import Journal

HELD_OUT_SEED = 100_000  # held-out clips never start from the noise of a calibration clip


@dataclass(eq=False)
class Session:
    """One component's quantization in progress: the pipeline, the plan, and what was observed.

    ``denoiser`` is the component's module, also where it is a text encoder or VAE; ``texts`` are those of calibration; ``sampled`` are the
    timesteps of the whole sampler, of which a denoiser may see a part. Float layers are kept in ``floats`` until the end, so that
    candidates can be compared and a failed run leaves the pipeline as it was. ``held_out`` are the texts that choices and the final check
    are made on: not those of calibration, or at least with other seeds. Statistics go to ``journal``, or stay in memory if it is None.
    """

    pipe: Any
    component: str
    denoiser: nn.Module
    recipe: Recipe
    progress: Progress
    arguments: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    plan: Plan = field(init=False)
    journal: Journal | None = None
    texts: list[str] = field(default_factory=list)
    measure: Measure = dict
    calibration: Calibration | None = None
    held_out: list[str] = field(default_factory=list)
    clock: tuple[Clock, ...] = ()
    sampled: list[float] = field(default_factory=list)
    floats: dict[str, nn.Module] = field(default_factory=dict)
    norms: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    drafts: dict[tuple[str, str], BuiltGroup] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def denoises(self) -> bool:
        """Whether the component is called with a timestep; a text encoder or VAE is not."""
        return kind_of_component(self.component, self.denoiser) == "denoiser"

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

    def begin(self, prompts: Sequence[str], overrides: dict[str, Any]) -> None:
        """Part the texts, and settle the pipeline call: the pipeline's own arguments, then the recipe's steps, then ``overrides``."""
        self.arguments = call_arguments(self.pipe, **overrides)
        wanted = self.recipe.calibrate
        if wanted is None:
            self.texts = list(prompts)
            return
        self.seed = wanted.seed
        self.texts = list(prompts[: wanted.prompts])
        self.held_out = list((prompts[wanted.prompts :] or prompts)[: self.recipe.search.prompts])
        if wanted.steps is not None and overrides.get("num_inference_steps") is None:
            self.arguments["num_inference_steps"] = wanted.steps

    @property
    def steps(self) -> int:
        """Denoising steps of a full run."""
        return self.arguments.get("num_inference_steps") or 50

    def held_out_latents(self, **overrides: Any) -> Tensor:
        """Final latents of the held-out clips by the pipeline as it is now."""
        arguments = {"on_step": self.progress.advance} | self.arguments | overrides
        return sample(self.pipe, self.held_out, seed=self.seed + HELD_OUT_SEED, output="latent", **arguments)

    def float_latents(self, **overrides: Any) -> Tensor:
        """The same by the float pipeline; sampled once for all recipes that share a calibration, before anything is quantized."""
        assert self.calibration is not None
        key = repr((self.held_out, self.seed, sorted(self.arguments.items()), overrides.get("num_inference_steps")))
        if key not in self.calibration.references:
            self.calibration.references[key] = self.held_out_latents(**overrides)
        return self.calibration.references[key]

    @property
    def trials(self) -> int:
        """How many candidates will be sampled."""
        return 0 if self.calibration is None else trial_count(self.plan, self.groups)

    @property
    def trial_arguments(self) -> dict[str, Any]:
        """What trials sample with instead."""
        return {"num_inference_steps": self.recipe.search.steps, "on_step": None}

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

    def observe(self, together: Sequence[Session]) -> list[Calibration]:
        """One sampling pass of the float pipeline for sessions that sample alike, this one first."""
        parts = [Part(session.denoiser, session.plan, session.journal) for session in together]
        return calibrate_together(self.pipe, parts, self.texts, seed=self.seed, arguments=self.arguments, on_step=self.progress.advance)

    def trial(self, assignment: Assignment, reference: Tensor) -> float:
        """How near a candidate comes to the float latents, in dB."""
        self.install(assignment, self.draft)
        try:
            return latent_psnr(reference, self.held_out_latents(**self.trial_arguments))
        finally:
            self.restore()

    def kernels(self) -> KernelFacts:
        """What computes the installed layers."""
        return kernels_of(self.denoiser)

    def attention(self) -> AttentionFacts | None:
        """What computes attention with few-bit operands, if the recipe asks for it."""
        return attention_facts(self.denoiser)

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
    """Quantize a pipeline's (first) denoiser in place: :func:`quantize_components` for one component.

    Args:
        calibration: statistics of an earlier run on the same float model; used if they hold what this recipe needs.

    Returns:
        The report, and the calibration for further recipes on the same float model.
    """
    component = denoiser_of(pipe)[0]
    known = {} if calibration is None else {component: calibration}
    report, found = quantize_components(pipe, {component: recipe}, prompts, skip=skip, progress=progress, calibrations=known, **overrides)
    return report, found.get(component)


def quantize_components(
    pipe: Any,
    recipes: Mapping[str, Recipe],
    prompts: Sequence[str] | None = None,
    *,
    skip: Sequence[str] = (),
    progress: Progress | None = None,
    calibrations: Mapping[str, Calibration] | None = None,
    **overrides: Any,
) -> tuple[Report, dict[str, Calibration]]:
    """Quantize components of a pipeline in place, one after the other.

    Denoisers that calibrate alike are observed in one sampling pass of the float pipeline, each over its own part of the trajectory. A
    denoiser's choices and its final check are made with those before it quantized already.

    Args:
        pipe: a diffusers pipeline in float.
        recipes: what to do, by component name; see :func:`reelquant.engine.components.assign`.
        prompts: texts; the recipe says how many calibrate, those after them are held out to make choices and for the final check.
        skip: further patterns of layers to keep float; each must match in one of the components.
        progress: hears how far the run is.
        calibrations: statistics of an earlier run on the same float models; used if they hold what the recipes need.
        overrides: arguments of the pipeline call during calibration (``num_inference_steps``, ``num_frames`` ...).

    Returns:
        The report, and the calibrations for further recipes on the same float models.

    Raises:
        ReelQuantError: and the pipeline is as it was.
    """
    sessions = [Session(pipe, name, component_of(pipe, name), recipe, progress or Silent()) for name, recipe in recipes.items()]
    made = plan_components(pipe, recipes, skip)
    for session in sessions:
        session.begin(prompts or (), overrides)
        session.plan = made[session.component]
        _check_weights(session)
    try:
        reports = run(sessions, calibrations or {})
    except BaseException:
        for session in reversed(sessions):
            stop_clock(session.denoiser)
            float_attention(session.denoiser)
            session.restore()
        raise
    for session in sessions:
        session.floats, session.norms = {}, {}
        start_runtime(session.denoiser)
    return total(reports), {session.component: session.calibration for session in sessions if session.calibration is not None}


def float_attention(denoiser: nn.Module) -> None:
    """Leave nothing of rounded attention in a denoiser that is float again."""
    round_attention(denoiser, None)
    stop_attention(denoiser)


def run(sessions: Sequence[Session], known: Mapping[str, Calibration]) -> dict[str, Report]:
    """Observe, sample what to compare with, then choose, build, install and check, one session after the other: a report of each.

    Whoever made the sessions puts the float layers back if this fails, and lets them go if it does not.
    """
    _observe(sessions, known)
    for session in sessions:
        _reference(session)
    return {session.component: _finish(session) for session in sessions}


def _check_weights(session: Session) -> None:
    """Refuse broken weights before anything is sampled; a layer that stays float would break the clips just as well."""
    for name in session.plan.layers:
        for part, value in get_module(session.denoiser, name).named_parameters(recurse=False):
            if not bool(value.isfinite().all()):
                raise CalibrationError(f"the {part} of layer '{name}' holds NaN or inf; the checkpoint is damaged or overflowed in float16")


def _observe(sessions: Sequence[Session], known: Mapping[str, Calibration]) -> None:
    """Statistics for every session whose recipe wants them; one sampling pass for those that sample alike."""
    alike: dict[str, list[Session]] = {}
    for session in sessions:
        found = known.get(session.component)
        if session.recipe.calibrate is None:
            continue
        if found is not None and found.suffices(session.plan):
            session.calibration, session.sampled = found, found.steps.timesteps
        else:
            alike.setdefault(repr((session.recipe.calibrate, session.arguments)), []).append(session)
    for together in alike.values():
        first = together[0]
        wanted = first.recipe.calibrate
        assert wanted is not None
        if not first.texts:
            raise CalibrationError(f"recipe '{first.recipe.name}' calibrates on {wanted.prompts} prompts and got none; pass prompts=[...]")
        with first.timed("calibrate", first.steps * -(-len(first.texts) // wanted.batch)):
            found = first.observe(together)
        times = {time for calibration in found for time in calibration.steps.timesteps}
        for session, calibration in zip(together, found, strict=True):
            session.calibration = calibration
            if session.recipe.guidance == "apart" and calibration.pairs is None:
                raise CalibrationError(
                    f"recipe '{session.recipe.name}' keeps the halves of guidance apart, and {type(session.pipe).__name__} samples without "
                    "classifier-free guidance: no call holds its latents twice, and no second call has those of the first; pass a "
                    "guidance_scale above 1, or drop 'guidance: apart'"
                )
            session.sampled = calibration.steps.timesteps if len(found) == 1 else sorted(times, reverse=True)


def _reference(session: Session) -> None:
    """What the float pipeline gives on held-out prompts, while all of it is float."""
    if session.calibration is not None:
        with session.timed("float reference", session.steps):
            session.float_latents()
            if session.trials:
                session.float_latents(**session.trial_arguments)
    if not session.denoises:
        try:
            session.measure = start_measuring(session.pipe, session.component, session.denoiser, session.texts)
        except UnsupportedError as error:
            session.warnings.append(f"what quantization does to its outputs is not measured: {error}")


def _finish(session: Session) -> Report:
    """Choose, build, install and check."""
    recipe = session.recipe
    before = model_bytes(session.denoiser)
    round_attention(session.denoiser, recipe.attention_numbers)  # from here on: the float reference was sampled before
    _start_clock(session)  # candidates with per-step scales need it as much as the final layers do
    assignment, trials = _search(session)
    with session.timed("build", len(session.groups)):
        chosen = session.install(assignment, lambda group, options: _solved(session, group, options))
    report = Report(recipe.name, recipe.digest(), type(session.denoiser).__name__, session.component)
    report.layers = [record for built in chosen for record in built.records]
    report.trials, report.timesteps, report.seed, report.warnings = trials, session.timesteps, session.seed, session.warnings
    if recipe.temporal == "table":
        _tables(session, report)
    _protect(session, report)
    _check(session, report)
    _account(session, report, before)
    return report


def _solved(session: Session, group: Group, options: Options) -> BuiltGroup:
    built = session.build(group, options)
    session.progress.advance()
    return built


def _search(session: Session) -> tuple[Assignment, list[Any]]:
    groups = session.groups
    if not session.trials:
        return choose(session.plan, groups, lambda assignment: 0.0)
    with session.timed("search", session.trials):
        reference = session.float_latents(**session.trial_arguments)

        def evaluate(assignment: Assignment) -> float:
            psnr = session.trial(assignment, reference)
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
    policy = session.recipe.protect_steps
    named = policy is not None and not isinstance(policy.steps, str)
    slots = slots_of(policy.steps, session.sampled, session.timesteps) if named else ()
    pairs = session.calibration.pairs if session.calibration and session.recipe.guidance == "apart" else None
    session.clock = (Clock(session.timesteps, slots, policy.inputs if policy else "float", pairs, session.plan.map.latent_argument),)
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


def _protect(session: Session, report: Report) -> None:
    """Find out which steps need more precise activations, if that is to be found out."""
    policy = session.recipe.protect_steps
    if policy is None:
        return
    if not session.clock:
        raise CalibrationError(f"protect_steps of '{report.recipe}' follows the timestep, and {report.denoiser} is called without one")
    clock = session.clock[0]
    if policy.steps == "auto":

        def latents(slots: Sequence[int]) -> Tensor:
            clock.protect(slots, policy.inputs)
            try:
                return session.held_out_latents(on_step=None)
            finally:
                session.progress.advance()

        with session.timed("measure steps", len(session.timesteps) + 1):
            report.steps = measure_steps(session.timesteps, latents, policy.share)
        clock.protect([found.step for found in report.steps if found.protected], policy.inputs)
    report.protected = list(clock.protected_slots)


def _check(session: Session, report: Report) -> None:
    """Sample the held-out prompts end to end: finite, and how far from float. Components that do not denoise are called by themselves."""
    report.figures = session.measure()
    if broken := [name for name, value in report.figures.items() if value != value]:
        raise CalibrationError(f"the quantized {session.component} ({report.recipe}) gives NaN ({broken[0]}); try a recipe with more bits")
    if session.calibration is None:
        return
    reference = session.float_latents()
    round_attention(session.denoiser, session.recipe.attention_numbers)  # its calls are counted anew
    with session.timed("check", session.steps):
        latents = session.held_out_latents()
    if not bool(latents.isfinite().all()):
        raise CalibrationError(
            f"the quantized pipeline ({report.recipe}) gives NaN or inf; try a recipe with more bits or float inputs (w8a16)"
        )
    report.latent_psnr = latent_psnr(reference, latents)
    report.prompts = list(session.calibration.prompts)


def attention_warnings(found: AttentionFacts, sampled: bool) -> list[str]:
    """What of the attention that a recipe asks for did not happen, in the clips of the check or on this machine."""
    if found.refused is not None:
        return [f"attention with {found.asked} is {found.by}"]
    ours = found.calls.get(found.kernel, 0)
    why = ", ".join(f"{reason} ({count} calls)" for reason, count in found.calls.items() if reason != found.kernel)
    if sampled and not ours:
        return [f"attention with {found.asked} computed no call: {why or 'none came through scaled_dot_product_attention'}"]
    return []


def _account(session: Session, report: Report, before: int) -> None:
    """Sizes, kernels, reasons and versions."""
    layers = {record.name: get_module(session.denoiser, record.name) for record in report.layers}
    tables = {
        name: layer.output_table.numel() * 4 for name, layer in layers.items() if isinstance(getattr(layer, "output_table", None), Tensor)
    }
    report.bytes_float = sum(record.bytes_before for record in report.layers)
    report.bytes_tables = sum(tables.values())
    report.bytes_quantized = sum(layer_bytes(layer) for layer in layers.values()) - report.bytes_tables
    report.bytes_model_float, report.bytes_model = before, model_bytes(session.denoiser)
    facts = session.kernels()
    report.kernel, report.simulated = facts.names, facts.simulated
    report.attention = session.attention()
    if report.attention is not None:
        report.warnings += attention_warnings(report.attention, sampled=session.calibration is not None)
    for row in session.plan.kept:
        report.kept.setdefault(row.kept or "", []).append(row.layer.name)
    report.seconds = session.seconds
    report.versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    replaced = [record.name for record in report.layers if record.replaced]
    if replaced:
        report.warnings.append(f"{len(replaced)} layers keep nearest rounding: their solver lost to it on its own objective")
