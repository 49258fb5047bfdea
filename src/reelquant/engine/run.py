"""From a float pipeline to a quantized one: discover, plan, observe, choose, build, install, check."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from reelquant._errors import CalibrationError, UnsupportedError
from reelquant._progress import Progress, Silent
from reelquant.clock import Clock
from reelquant.discover import component_of, denoiser_of, modules_of, plain
from reelquant.engine.blocks import solve_blocks
from reelquant.engine.build import BuiltGroup
from reelquant.engine.calibration import Calibration, Part, calibrate_together
from reelquant.engine.components import Inputs, mapping, plan_components, start_measuring
from reelquant.engine.decoding import start_decoding
from reelquant.engine.quality import layer_bytes, model_bytes
from reelquant.engine.report import Report, total
from reelquant.engine.search import Assignment, Trial, choose, family
from reelquant.engine.session import Session
from reelquant.engine.store import Memory, Store
from reelquant.engine.undisturbed import undisturbed
from reelquant.formats.criteria import latent_psnrs
from reelquant.models.condition import Prompts, as_condition, fitted, texts_of
from reelquant.models.conditions import CONDITIONS, at_once
from reelquant.models.defaults import missing, notice
from reelquant.models.described import described
from reelquant.models.sampling import check_call
from reelquant.nn import Saturation, check_finite, get_module, start_clock, start_runtime, stop_clock
from reelquant.recipes.recipe import Recipe


def quantize_pipeline(
    pipe: Any,
    recipe: Recipe,
    prompts: Prompts | None = None,
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
    report, calibrations = quantize_components(
        pipe, {component: recipe}, prompts, skip=skip, progress=progress, calibrations=known, **overrides
    )
    return report, calibrations.get(component)


def quantize_components(
    pipe: Any,
    recipes: Mapping[str, Recipe],
    prompts: Prompts | None = None,
    *,
    skip: Sequence[str] = (),
    progress: Progress | None = None,
    calibrations: Mapping[str, Calibration] | None = None,
    inputs: Inputs | None = None,
    store_of: Callable[[str, nn.Module], Store] = lambda name, module: Memory(module),
    **overrides: Any,
) -> tuple[Report, dict[str, Calibration]]:
    """Quantize components of a pipeline in place, one after the other.

    Denoisers that calibrate alike are observed in one sampling pass of the float pipeline, each over its own part of the trajectory. A
    denoiser's choices and its final check are made with those before it quantized already.

    Args:
        pipe: a diffusers pipeline in float.
        recipes: what to do, by component name; see :func:`reelquant.engine.components.assign`.
        prompts: texts; the recipe says how many calibrate, those after them are held out to make choices and for the final check.
        skip: further patterns of layers that stay float; each must match in one of the components.
        progress: hears how far the run is.
        calibrations: statistics of an earlier run on the same float models; used if they hold what the recipes need.
        inputs: arguments of a real call, to map denoisers that take no made-up ones; see :func:`reelquant.engine.components.mapping`.
        store_of: the store of a component, by its name and module.
        overrides: arguments of the pipeline call during calibration (``num_inference_steps``, ``num_frames`` ...).

    Returns:
        The report, and the calibrations for further recipes on the same float models.

    Raises:
        ReelQuantError: and the pipeline is as it was.
    """
    check_call(type(pipe), [name for name, value in overrides.items() if value is not None])
    modules = {name: plain(component_of(pipe, name)) for name in recipes}
    for name, part in modules_of(pipe).items():  # broken ones beside those that are quantized would break the clips just as well
        if name not in modules:
            check_finite(name, part)
    prompts = fitted(type(pipe), prompts or ())
    with undisturbed(modules_of(pipe).values()):
        bundled = missing(pipe, prompts, overrides) if any(recipe.calibrate is not None for recipe in recipes.values()) else {}
    overrides |= bundled
    plans = plan_components(pipe, recipes, skip, mapping(pipe, prompts, inputs, overrides))
    sessions = [Session(pipe, name, module, plans[name], store_of(name, module), progress or Silent()) for name, module in modules.items()]
    with undisturbed(modules_of(pipe).values()):
        reports = run_all(sessions, calibrations or {}, prompts, overrides, [notice(type(pipe), bundled)])
    for session in sessions:
        session.commit()
        start_runtime(session.denoiser)
    return total(reports), {s.component: s.calibration for s in sessions if s.calibration is not None}


def run_all(
    sessions: Sequence[Session],
    known: Mapping[str, Calibration],
    prompts: Prompts,
    overrides: dict[str, Any],
    warnings: Sequence[str | None] = (),
) -> dict[str, Report]:
    """:func:`run`, and every component as it was if that fails. Warnings go into the first report."""
    sessions[0].warnings += filter(None, warnings)
    try:
        for session in sessions:
            session.begin(prompts, overrides)
            session.store.check_weights(session.plan)
        return run(sessions, known)
    except BaseException:
        for session in reversed(sessions):
            stop_clock(session.denoiser)
            session.roll_back()
        raise


def run(sessions: Sequence[Session], known: Mapping[str, Calibration]) -> dict[str, Report]:
    """Sample what to compare with, observe, then choose, build, install and check, one session after the other: a report of each.

    The caller puts the float layers back if this fails, and lets them go if it does not.
    """
    for session in sessions:
        _reference(session, known.get(session.component))
    for session in sessions:
        for entry in session.plan.acting("before_observing"):
            entry.stage.before_observing(session)
    _observe(sessions, known)
    for session in sessions:
        session.end_float_latents()
    return {session.component: _finish(session) for session in sessions}


def _reference(session: Session, known: Calibration | None) -> None:
    """What the float pipeline gives on held-out prompts, before any stage changes it."""
    wanted = session.recipe.calibrate
    if known is not None:
        session.references = known.references
    if wanted is not None:
        if not session.texts.written:
            raise CalibrationError(
                f"recipe '{session.recipe.name}' calibrates on {wanted.prompts} prompts and got none; pass prompts=[...]"
            )
        with session.timed("float reference", session.steps):
            if session.decodes:
                session.decode = start_decoding(session.denoiser, session.held_out_frames)
            else:
                session.begin_float_latents()
                if session.trials:
                    session.begin_float_latents(**session.trial_arguments)
    if not session.denoises:
        try:
            session.measure = start_measuring(session.pipe, session.component, session.denoiser, texts_of(session.texts.written))
        except UnsupportedError as error:
            session.warnings.append(f"what quantization does to its outputs is not measured: {error}")


def _observe(sessions: Sequence[Session], known: Mapping[str, Calibration]) -> None:
    """Statistics for every session whose recipe wants them; one sampling pass for those that sample alike."""
    alike: dict[str, list[Session]] = {}
    for session in sessions:
        earlier = known.get(session.component)
        if session.recipe.calibrate is None:
            continue
        if earlier is not None and earlier.suffices(session.plan, session.denoiser):
            session.calibration, session.sampled = earlier, earlier.steps.timesteps
        else:
            alike.setdefault(repr((session.recipe.calibrate, described(session.arguments))), []).append(session)
    for together in alike.values():
        _observe_together(together)


def _observe_together(together: Sequence[Session]) -> None:
    first = together[0]
    wanted = first.recipe.calibrate
    assert wanted is not None
    parts = [Part(session.denoiser, session.plan, session.store.keeper) for session in together]
    size = at_once(type(first.pipe), first.arguments, wanted.batch, first.texts.written)
    runs = sum(-(-len(texts) // size) for texts in first.texts)
    how = {"seed": first.seed, "arguments": first.arguments, "on_step": first.advance}
    with first.timed("calibrate", first.steps * runs):
        calibrations = first.store.begun("calibrate", lambda: calibrate_together(first.pipe, parts, first.texts, **how))()
    timed = [calibration for session, calibration in zip(together, calibrations, strict=True) if session.denoises]
    times = {timestep for calibration in timed for timestep in calibration.steps.timesteps}
    for session, calibration in zip(together, calibrations, strict=True):
        session.store.observed()
        session.calibration, calibration.references = calibration, session.references
        session.sampled = calibration.steps.timesteps if len(together) == 1 or not session.denoises else sorted(times, reverse=True)
        if session.decodes:
            unseen = {name for name, seen in calibration.inputs.items() if not seen.range.seen}
            session.plan = session.plan.without(unseen, "never called by the sampler")


def _finish(session: Session) -> Report:
    """Choose, build, install and check."""
    before = model_bytes(session.denoiser)
    _start_clock(session)  # candidates with per-step scales need it as much as the final layers do
    for entry in session.plan.acting("choose_specs"):
        session.plan = session.plan.with_specs(entry.stage.choose_specs(session))
    assignment, trials = _search(session)
    groups = _build(session, assignment)
    session.install(groups)
    report = session.report = Report(session.recipe.name, session.recipe.digest(), type(session.denoiser).__name__, session.component)
    report.layers = [record for built in groups for record in built.records]
    report.trials, report.timesteps, report.seed, report.warnings = trials, session.timesteps, session.seed, session.warnings
    for entry in session.plan.acting("after_installing"):
        entry.stage.after_installing(session)
    _check(session, report)
    _account(session, report, before)
    return report


def _start_clock(session: Session) -> None:
    """Per-step scales and tables follow the denoiser's timestep; stages may say more about the clock before it starts."""
    argument = session.map.timestep_argument
    if session.timesteps and argument is not None:
        session.clock = Clock(session.timesteps)
    for entry in session.plan.acting("before_choosing"):
        entry.stage.before_choosing(session)
    if session.clock is not None and argument is not None:
        start_clock(session.denoiser, session.clock, argument)


def _search(session: Session) -> tuple[Assignment, list[Trial]]:
    if not session.trials:
        return choose(session.plan, session.groups, lambda assignments: [0.0] * len(assignments))
    with session.timed("search", session.trials):
        reference = session.float_latents(**session.trial_arguments)

        def evaluate(assignments: Sequence[Assignment]) -> list[float]:
            return session.store.each("trials", [functools.partial(attempt, one) for one in assignments])

        def attempt(assignment: Assignment) -> float:
            psnr = session.trial(assignment, reference)
            session.advance()
            return psnr

        chosen = choose(session.plan, session.groups, evaluate)
        session.store.drafts_done()
        return chosen


def _build(session: Session, assignment: Assignment) -> list[BuiltGroup]:
    groups: list[BuiltGroup] = []
    with session.timed("build", len(session.groups)):
        for group in session.groups:
            groups.append(session.build(group, assignment[family(group)]))
            session.advance()
    solve_blocks(session, assignment, groups)
    return groups


def _check(session: Session, report: Report) -> None:
    """Sample the held-out prompts end to end: finite, and how far from float. Components that do not denoise are called alone."""
    seen = Saturation()
    with seen.counting(session.denoiser):
        report.figures = session.decode()
    report.figures |= session.measure()
    if broken := [name for name, value in report.figures.items() if value != value]:
        raise CalibrationError(f"the quantized {session.component} ({report.recipe}) gives NaN ({broken[0]}); try more bits")
    if session.calibration is not None:
        for entry in session.plan.acting("before_check"):
            entry.stage.before_check(session)
        if not session.decodes:
            _check_latents(session, report, seen)
        report.saturation = seen.facts()
        report.warnings += [sentence] if (sentence := seen.sentence()) else []
        report.prompts, report.held_out = texts_of(session.calibration.prompts), texts_of(session.held_out)
        report.conditions = conditions_of(session)
    for entry in session.plan.acting("after_check"):
        entry.stage.after_check(session)


def _check_latents(session: Session, report: Report, seen: Saturation) -> None:
    reference = session.float_latents()
    with session.timed("check", session.steps), seen.counting(session.denoiser):
        latents = session.held_out_latents()
    _refuse_broken(latents, report)
    psnrs = latent_psnrs(reference, latents)
    report.latent_psnr, report.latent_psnr_worst = float(psnrs.mean()), float(psnrs.amin())


def conditions_of(session: Session) -> dict[str, Any]:
    """What clips were made from beside their texts, pictures as sizes and sums; empty where it was texts alone."""
    assert session.calibration is not None
    named = {name: value for name, value in session.arguments.items() if name in CONDITIONS and value is not None}
    uses = {"calibration": session.calibration.prompts, "held_out": session.held_out}
    own = {use: [dict(as_condition(one).inputs) for one in prompts] for use, prompts in uses.items()}
    found = {"every": named} | {use: inputs for use, inputs in own.items() if any(inputs)}
    return described({use: values for use, values in found.items() if values})


def _refuse_broken(latents: Tensor, report: Report) -> None:
    if not bool(latents.isfinite().all()):
        raise CalibrationError(
            f"the quantized pipeline ({report.recipe}) gives NaN or inf; try a recipe with more bits or float inputs (w8a16)"
        )


def _account(session: Session, report: Report, before: int) -> None:
    """Sizes, kernels, reasons and versions."""
    layers = {record.name: get_module(session.denoiser, record.name) for record in report.layers}
    tables = [getattr(layer, "output_table", None) for layer in layers.values()]
    report.bytes_float = sum(record.bytes_before for record in report.layers)
    report.bytes_tables = sum(table.numel() * 4 for table in tables if isinstance(table, Tensor))
    report.bytes_quantized = sum(layer_bytes(layer) for layer in layers.values()) - report.bytes_tables
    report.bytes_model_float, report.bytes_model = before, model_bytes(session.denoiser)
    facts = session.store.kernels()
    report.kernel, report.simulated = facts.names, facts.simulated
    for row in session.plan.skipped:
        report.skipped.setdefault(row.skipped or "", []).append(row.layer.name)
    report.seconds = session.seconds
    report.versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    replaced = [record.name for record in report.layers if record.replaced]
    if replaced:
        report.warnings.append(f"{len(replaced)} layers keep nearest rounding: their solver lost to it on its own objective")
