"""Open a pipeline, measure what rounding does to it, and leave a table and a picture of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from reelquant._errors import CheckpointError, RecipeError, nearest
from reelquant._progress import Progress, Silent
from reelquant._version import __version__
from reelquant.allocate.budget import allocate
from reelquant.allocate.problem import Problem
from reelquant.allocate.sampled import around, random_picks
from reelquant.allocate.sizes import check_weight, weight_bytes
from reelquant.allocate.steps import plans_over
from reelquant.allocate.table import FILE, Configuration, Damage, Measure, Part, SensitivityTable, Tried, load_table
from reelquant.damage.gains import Gains, gains
from reelquant.damage.gradient import by_gradient
from reelquant.damage.kept import Kept
from reelquant.damage.noise import by_noise
from reelquant.damage.picture import draw
from reelquant.damage.plans import try_plans
from reelquant.damage.rounding import check_input, own_inputs, own_weights
from reelquant.damage.scene import SEED, Scene, Target
from reelquant.damage.trajectory import by_trajectory, steps_by_trajectory, try_configurations
from reelquant.discover import modules_of
from reelquant.engine.components import assign, mapping, plan_components
from reelquant.engine.undisturbed import undisturbed
from reelquant.evidence.sampling import ClipSource
from reelquant.models.condition import Prompts, fitted, texts_of
from reelquant.models.conditions import check_given, no_texts, reads_texts
from reelquant.models.defaults import missing
from reelquant.models.described import described
from reelquant.models.pipelines import calibration_prompts
from reelquant.models.sampling import check_call
from reelquant.recipes.usual import MAPPED

FORMATS = ("int3/group-64", "int4/group-64", "int5/channel", "int6/channel", "int8/channel")
INPUT_BITS, STEP_BITS = (3, 4, 5, 6, 7, 8), (4, 6, 8)
EVERY_STEP = 16  # ranges of steps that a budget over layers and steps is told apart by, at most
PICTURE = "sensitivity.png"


@dataclass(frozen=True)
class Wanted:
    """What is measured.

    Attributes:
        recipe: ranges of weights, formats of inputs, and which layers stay float come from it.
        measures: how, of ``trajectory``, ``gradient``, ``noise``.
        formats: of weights.
        inputs: of inputs; None: the recipe's own with 3 to 8 bits; none to leave inputs alone.
        steps: whether all inputs, and all weights, are rounded at single steps and sampled, as ``trajectory`` always does; the recipe's own
            formats with 4, 6 and 8 bits, for inputs those of ``inputs`` where these are named. Others lie between them. The map of layers
            over steps then has every step, up to :data:`EVERY_STEP` of them.
        clips: how many are sampled at a time.
        ranges: into how many ranges the steps are divided, for the map of layers over steps.
        noise_calls: recorded calls that noise is measured on.
        configurations: whole allocations that are tried out beside.
        components: the denoisers; all by default.
        skip: patterns of layers that are not measured.
        budgets: of bits over steps and layers, by part; the map of layers over steps has every step for them, too, and the plans are
            sampled on other texts, see :func:`try_plans`.
        trials: clips of a trial.
    """

    recipe: Any = MAPPED
    measures: tuple[Measure, ...] = ("gradient",)
    formats: tuple[str, ...] = FORMATS
    inputs: tuple[str, ...] | None = None
    steps: bool = False
    clips: int = 4
    ranges: int = 5
    noise_calls: int = 5
    configurations: int = 0
    components: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    budgets: Mapping[Part, float] = field(default_factory=dict)
    trials: int = 8

    def __post_init__(self) -> None:
        known = get_args(Measure)
        for one in self.measures:
            if one not in known:
                raise RecipeError(f"unknown measure '{one}'; {nearest(one, known)}")
        if not self.measures:
            raise RecipeError(f"name at least one way to measure: {', '.join(known)}")
        if len(set(self.formats)) != len(self.formats) or not self.formats:
            raise RecipeError(f"formats are different ones, one at least; got {list(self.formats)}")
        for one in self.formats:
            check_weight(one, "formats")
        for one in self.inputs or ():
            check_input(one)
        for name in ("clips", "ranges", "noise_calls", "trials"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is at least 1, got {getattr(self, name)}")
        if "input" in self.budgets and self.inputs == ():
            raise RecipeError("a budget of bits of inputs needs their damages, and inputs is empty; leave inputs out, or name formats")
        if self.configurations < 0:
            raise RecipeError(f"configurations is at least 0, got {self.configurations}")


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        table: the damages.
        seconds: of the processor, that each way took, runs before this one included.
        output: the folder with ``sensitivity.json`` and ``sensitivity.png``; None if nothing was written.
    """

    table: SensitivityTable
    seconds: Mapping[str, float]
    output: Path | None


def measure(
    pipe: Any,
    model: Any,
    output: Path | None,
    wanted: Wanted,
    prompts: Prompts | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
    call: Mapping[str, Any] | None = None,
) -> Measured:
    """Measure a pipeline in float; see :func:`reelquant.sensitivity`.

    Args:
        pipe: the opened pipeline.
        model: what it was opened from.
    """
    with undisturbed(modules_of(pipe).values()):
        scene = scene_of(pipe, wanted, prompts, progress=progress, call=call)
        settings = _settings(model, wanted, scene.prompts, scene.call)
        before = None if output is None else _before(output, settings, force=force)
        kept = Kept(output, {key: value for key, value in settings.items() if key not in LATER})
        scene.record()
        rows, configurations, together = [], [], {}
        for target in scene.targets:
            mine, tried, cosines = _measured(scene, target, wanted, kept)
            rows += mine
            configurations += tried
            together |= {(target.component, *key): found.tolist() for key, found in cosines.items() if found is not None}
        name = scene.targets[0].plan.recipe.name
        table = SensitivityTable(
            settings["model"], name, tuple(layer for target in scene.targets for layer in target.layers), tuple(rows),
            tuple(configurations), {target.component: tuple(target.timesteps) for target in scene.targets}, settings, together=together,
        )  # fmt: skip
        if wanted.budgets:
            table = table.as_saved()
            table = replace(table, tried=tuple(_tried(scene, table, wanted, prompts, kept)))
    if before is not None:  # what people wrote into the file stays there
        table = replace(table, skip=before.skip, fixed=before.fixed)
    if output is not None:
        table.save(output / FILE)
        draw(table, output / PICTURE)
    return Measured(table, {one: kept.spent(one) for one in ("gain", "trajectory", "gradient", "noise", "configuration")}, output)


def _tried(scene: Scene, table: SensitivityTable, wanted: Wanted, prompts: Prompts | None, kept: Kept) -> list[Tried]:
    """The plans of all budgets, sampled with the texts and the noise after those of the map."""
    texts = _texts(scene.pipe, scene.call, prompts, wanted.clips, wanted.trials)
    own = Scene(scene.pipe, scene.targets, texts, scene.call, scene.progress, SEED + wanted.clips)
    return [
        one
        for target in scene.targets
        for part, bits in wanted.budgets.items()
        for one in try_plans(own, target, list(plans_over(table, bits, target.component, part=part).values()), kept)
    ]


def _texts(pipe: Any, call: Mapping[str, Any], prompts: Prompts | None, first: int, count: int) -> list[Any]:
    """Texts or conditions of clips from the first one on; those of the pipeline if none are given."""
    if prompts is None:
        prompts = calibration_prompts(pipe, first + count) if reads_texts(type(pipe), call) else no_texts(first + count)
    return list(fitted(type(pipe), [prompts[number % len(prompts)] for number in range(first, first + count)]))


def scene_of(
    pipe: Any, wanted: Wanted, prompts: Prompts | None, *, progress: Progress | None = None, call: Mapping[str, Any] | None = None
) -> Scene:
    """What damages of a pipeline are measured on; nothing is sampled yet."""
    call = {name: value for name, value in (call or {}).items() if value is not None}
    check_call(type(pipe), call)
    recipes = assign(pipe, wanted.recipe, wanted.components)
    texts = _texts(pipe, call, prompts, 0, wanted.clips)
    call |= missing(pipe, texts, call)
    check_given(type(pipe), call, texts)
    plans = plan_components(pipe, recipes, wanted.skip, mapping(pipe, texts, None, call))
    return Scene(pipe, [Target.of(pipe, name, plan) for name, plan in plans.items()], texts, call, progress or Silent())


LATER = ("measures", "formats", "inputs", "ranges", "configurations", "noise_calls", "skip", "steps", "budgets", "trials")
"""Settings that may change from run to run of one folder: what they ask for is measured beside what is there."""


def _settings(model: Any, wanted: Wanted, texts: Sequence[Any], call: Mapping[str, Any]) -> dict[str, Any]:
    source = ClipSource(model)
    recipe = wanted.recipe if isinstance(wanted.recipe, str) else described(wanted.recipe)
    return {
        "version": __version__,
        "model": source.name,
        "identity": source.identity,
        "recipe": recipe,
        "prompts": texts_of(texts),
        "conditions": described(list(texts)),
        "seed": SEED,
        "call": described(dict(call)),
        **{name: described(getattr(wanted, name)) for name in LATER},
    }


def _before(output: Path, settings: Mapping[str, Any], *, force: bool) -> SensitivityTable | None:
    """The table that an earlier run left, if it is of the same measurement.

    Raises:
        CheckpointError: if it is of another one, and the caller did not say that it may go.
    """
    if not (output / FILE).is_file():
        return None
    before = load_table(output)
    changed = [key for key in settings if key not in LATER and before.settings.get(key) != settings[key]]
    if changed and not force:
        was, now = (f"{side.get(changed[0])!r:.80}" for side in (before.settings, settings))
        raise CheckpointError(
            f"'{output / FILE}' was measured with another {changed[0]}: {was}, now {now}; choose another --output, or replace it with "
            "force=True (--force)"
        )
    return before


Cosines = dict[tuple[Part, Measure], Any]  # between the errors of single steps, see SensitivityTable.together


def _measured(scene: Scene, target: Target, wanted: Wanted, kept: Kept) -> tuple[list[Damage], list[Configuration], Cosines]:
    """Everything that is wanted of one denoiser."""
    inputs = own_inputs(target, INPUT_BITS) if wanted.inputs is None else wanted.inputs
    ranges = cut(len(target.timesteps), max(wanted.ranges, EVERY_STEP if wanted.steps or wanted.budgets else 1))
    rows: list[Damage] = []
    cosines: Cosines = {}
    found: Gains | None = None
    if "noise" in wanted.measures:
        found = gains(scene, target, kept)
    if "gradient" in wanted.measures:
        mine, cosines["weight", "gradient"] = by_gradient(scene, target, wanted.formats, inputs, ranges, kept)
        rows += mine
    if "noise" in wanted.measures and found:
        rows += by_noise(scene.progress, target, wanted.formats, inputs, wanted.noise_calls, kept).rows(found, ranges)
    if "trajectory" in wanted.measures:
        rows += by_trajectory(scene, target, [(layer.name, "weight", fmt, None) for layer in target.layers for fmt in wanted.formats], kept)
    if "trajectory" in wanted.measures or wanted.steps:
        parts: dict[Part, Sequence[str]] = {
            "input": own_inputs(target, STEP_BITS) if wanted.inputs is None else inputs,
            "weight": own_weights(target, STEP_BITS),
        }
        for part, formats in parts.items():
            mine, cosines[part, "trajectory"] = steps_by_trajectory(scene, target, part, formats, kept)
            rows += mine
    if not wanted.configurations:
        return rows, [], cosines
    table = SensitivityTable("", "", target.layers, tuple(rows))
    return rows, try_configurations(scene, target, configurations(table, target.component, wanted.configurations), kept), cosines


def cut(steps: int, ranges: int) -> list[tuple[int, int]]:
    """So many ranges of steps (fewer if there are fewer steps), as equal as possible: first and last step of each."""
    count = min(steps, ranges)
    ends = [round(number * steps / count) for number in range(count + 1)]
    return [(first, last - 1) for first, last in itertools.pairwise(ends)]


def configurations(table: SensitivityTable, component: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Formats for all layers, at budgets between the smallest and the largest format: half at random, half near the best allocation."""
    formats, layers = table.formats("weight", table.measures[0]), table.of(component)
    import numpy as np

    sizes = np.array([[weight_bytes(fmt, layer.shape) for fmt in formats] for layer in layers], dtype=float)
    rows = table.select()
    damage = np.array([[rows[component, layer.name, fmt].damage for fmt in formats] for layer in layers])
    least, most = sizes.min(1).sum(), sizes.max(1).sum()
    found = []
    for number in range(count):
        share = (number // 2 + 0.5) / -(-count // 2)
        problem = Problem(damage, sizes, least + (0.05 + 0.75 * share) * (most - least), seed=seed + number)
        if number % 2:
            bits = 8 * problem.budget / sum(layer.weights for layer in layers)
            best = allocate(table, bits=bits).of(component)
            picks = around(problem, [formats.index(best[layer.name]) for layer in layers], 1)[0]
        else:
            picks = random_picks(problem, 1)[0]
        found.append({layer.name: formats[pick] for layer, pick in zip(layers, picks, strict=True)})
    return found
