"""Which recipe every component of a pipeline gets, and what quantization did to those that do not denoise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reelquant._errors import RecipeError, UnsupportedError, nearest
from reelquant.discover import (
    TIMED,
    bind,
    component_of,
    denoisers_of,
    discover,
    discover_or_outline,
    kind_of_component,
    modules_of,
    outline,
    plain,
)
from reelquant.engine.plan import Plan, make_plan
from reelquant.engine.undisturbed import undisturbed
from reelquant.models.blank import check_names
from reelquant.models.condition import Prompts
from reelquant.models.conditions import no_texts, reads_texts
from reelquant.models.defaults import own_pictures
from reelquant.models.fused import drop_unused_projections
from reelquant.models.origin import origin_of
from reelquant.models.parts import cosines, decibels, embed, fitting_clip, round_trip, seen
from reelquant.models.pipelines import calibration_prompts
from reelquant.models.sampling import first_call
from reelquant.nn import check_finite, quantized_layers
from reelquant.recipes.entry import Entry
from reelquant.recipes.recipe import Recipe, load_recipe
from reelquant.recipes.text import EXTENDS
from reelquant.recipes.usual import SAFE
from reelquant.sites import DenoiserMap, select
from reelquant.stages import HOOKS

RecipeSource = str | Path | Mapping[str, Any] | Recipe
SEEN = (*TIMED, "image encoder")  # components whose inputs are seen while a pipeline samples latents
TEXTS = 8  # prompts whose embeddings are compared


def assign(
    pipe: Any, recipe: RecipeSource, components: Sequence[str] | None = None, overrides: Mapping[str, Any] | None = None
) -> dict[str, Recipe]:
    """The recipe of every component that is to be quantized, denoisers first.

    Args:
        pipe: a pipeline.
        recipe: one for all denoisers and ControlNets, or a mapping from component to recipe.
        components: which to quantize; all denoisers by default, and those that the mapping names. Encoders and VAEs that the mapping does
            not name get :data:`~reelquant.recipes.usual.SAFE`.
        overrides: dotted changes to the recipes that were given.

    Raises:
        RecipeError: a denoiser without a recipe, or a recipe for a component without timesteps that cannot do without them.
        UnsupportedError: for a component that is not there, or of which nothing is known.
    """
    table = recipe if _by_component(pipe, recipe) else None
    given = {} if table is None else {name: load_recipe(one, overrides and dict(overrides)) for name, one in table.items()}
    wanted = dict.fromkeys([*given, *(components or ([] if given else denoisers_of(pipe)))])
    kinds = {name: kind_of_component(name, component_of(pipe, name)) for name in wanted}
    found: dict[str, Recipe] = {}
    for name in sorted(wanted, key=lambda name: TIMED.index(kinds[name]) if kinds[name] in TIMED else len(TIMED)):
        if name in given:
            found[name] = given[name]
        elif kinds[name] not in TIMED:
            found[name] = load_recipe(SAFE)
        elif table is None:
            found[name] = load_recipe(recipe, overrides and dict(overrides))  # type: ignore[arg-type]
        else:
            raise RecipeError(f"component '{name}' has no recipe; the mapping names {', '.join(given)}")
        if kinds[name] not in SEEN:
            check_stepless(found[name], name, kinds[name])
    return found


def check_stepless(recipe: Recipe, name: str, kind: str) -> None:
    """Refuse recipes that cannot be followed without denoising steps. VAEs are calibrated by what they encode and decode."""
    if recipe.data_free:
        return
    if kind != "vae":
        raise RecipeError(
            f"recipe '{recipe.name}' calibrates over denoising steps, and component '{name}' ({kind}) has none; "
            f"give it one that needs no data: {SAFE} or w4a16"
        )
    stages = {entry.name: entry for entry in recipe.entries}
    whole = next((word for word, entry in stages.items() if _of_steps(entry)), None)
    several = next((word for word, entry in stages.items() if len(entry.alternatives) > 1), None)
    if whole or several:
        why = f"'{whole}' of it works on calls of a denoiser" if whole else f"'{several}' of it is chosen by sampling latents"
        raise RecipeError(f"recipe '{recipe.name}' does not suit component '{name}' ({kind}): {why}; give it minmax-w8a8 or {SAFE}")


def _of_steps(entry: Entry) -> bool:
    return entry.stage.records > 0 or any(HOOKS[hook].scope in ("model", "block") for hook in entry.stage.hooks())


def _by_component(pipe: Any, recipe: RecipeSource) -> bool:
    """Is this a mapping from components to recipes? One with the keys of a recipe is a recipe."""
    if not isinstance(recipe, Mapping) or {"defaults", EXTENDS} & set(recipe):
        return False
    parts = modules_of(pipe)
    for name in recipe:
        if name not in parts:
            raise RecipeError(
                f"'{name}' is not a component of {type(pipe).__name__} (which has {', '.join(parts)}) and this mapping is not a recipe, as "
                f"it has no 'defaults'; {nearest(name, parts)}"
            )
    return True


Measure = Callable[[], dict[str, float]]


def start_measuring(pipe: Any, name: str, part: nn.Module, prompts: Sequence[str]) -> Measure:
    """Run a float component, and return what compares it, quantized, with that.

    Figures: ``prompt_cosine`` and ``prompt_cosine_min`` over the tokens of the prompts; ``round_trip_psnr`` in dB of a small moving clip
    through the VAE; ``picture_cosine`` and ``picture_cosine_min`` over what an encoder gives for the bundled pictures; none for denoisers
    and ControlNets, which sampled clips are for.

    Raises:
        UnsupportedError: if the pipeline or the encoder cannot be asked for embeddings.
    """
    kind = kind_of_component(name, part)
    if kind == "vae":
        clip = fitting_clip(part)
        before = round_trip(part, clip)
        return lambda: {"round_trip_psnr": decibels(before, round_trip(part, clip))}
    if kind == "text encoder":
        known = embed(pipe, prompts[:TEXTS])
        return lambda: _cosines("prompt", known, embed(pipe, prompts[:TEXTS]))
    if kind == "image encoder":
        pictures = own_pictures()
        before = seen(part, pictures)
        return lambda: _cosines("picture", before, seen(part, pictures))
    return dict


def _cosines(what: str, known: Sequence[Tensor], now: Sequence[Tensor]) -> dict[str, float]:
    values = cosines(known, now)
    return {f"{what}_cosine": float(values.mean()), f"{what}_cosine_min": float(values.min())}


def default_texts(pipe: Any, recipes: Mapping[str, Recipe], call: Mapping[str, Any] | None = None) -> list[str]:
    """As many texts as the recipes calibrate and check with, where the user gives none."""
    wanted = [one.calibrate.prompts + one.search.prompts for one in recipes.values() if one.calibrate is not None]
    count = max([*wanted, TEXTS])
    return calibration_prompts(pipe, count) if reads_texts(type(pipe), call or {}) else no_texts(count)


Inputs = Mapping[str, Any]
MapOf = Callable[[str, nn.Module, Recipe], DenoiserMap]


def mapping(pipe: Any, prompts: Prompts = (), inputs: Inputs | None = None, call: Mapping[str, Any] | None = None) -> MapOf:
    """How the components of a pipeline in memory are mapped.

    A denoiser runs on tiny made-up inputs. One that takes none of them is outlined if its recipe needs no data; else it runs on the
    arguments of the first call that its pipeline makes. Those of a :class:`reelquant.models.denoiser.Denoiser` always do.

    Args:
        pipe: the pipeline.
        prompts: one of them is sampled where a call is needed.
        inputs: the arguments of a real call by name, or of one per denoiser by component; then nothing is made up.
        call: arguments of the pipeline call.
    """

    def map_of(name: str, part: nn.Module, recipe: Recipe) -> DenoiserMap:
        if kind_of_component(name, part) not in TIMED:
            return outline(part)
        if inputs is not None:
            return discover(part, dict(inputs.get(name, inputs)))
        if hasattr(pipe, "learn"):
            return discover(plain(part), pipe.learn(prompts, call or {}))
        if recipe.data_free:
            return discover_or_outline(plain(part))
        try:
            return discover(part)
        except UnsupportedError as error:
            return discover(part, _first_call(error, pipe, part, prompts, call or {}))

    return map_of


def _first_call(refused: UnsupportedError, pipe: Any, part: nn.Module, prompts: Prompts, call: Mapping[str, Any]) -> dict[str, Any]:
    """What a denoiser is called with first; the refusal of made-up inputs if its pipeline does not get that far."""
    try:
        found = first_call(pipe, plain(part), list(prompts[:1]) or calibration_prompts(pipe, 1), **call)
    except Exception as error:  # a pipeline can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedError(f"{refused}; nor did {type(pipe).__name__} get as far as its first call: {reason}") from error
    if found is None:
        raise refused
    return bind(plain(part), *found)


def plan_components(pipe: Any, recipes: Mapping[str, Recipe], skip: Sequence[str], map_of: MapOf | None = None) -> dict[str, Plan]:
    """A plan for every component. With several, a pattern of the user's counts where it names a layer, and must do so somewhere.

    Args:
        map_of: the map of a component, by name, module and recipe; :func:`mapping` by default.

    Raises:
        CalibrationError: for a component whose weights are not finite.
        UnsupportedError: for a component that is quantized already, or could not be opened again once it is saved.
    """
    map_of = map_of or mapping(pipe)
    parts = {name: plain(component_of(pipe, name)) for name in recipes}
    for name, part in parts.items():
        _check_float(pipe, name, part)
        drop_unused_projections(part)
        check_names(name, part)
        check_finite(name, part)
    with undisturbed(modules_of(pipe).values()):
        maps = {name: map_of(name, parts[name], recipe) for name, recipe in recipes.items()}
    every = [layer for map_ in maps.values() for layer in map_.layers.values()]
    for pattern in skip:
        select(pattern, every)
    return {name: make_plan(recipes[name], map_, parts[name], skip) for name, map_ in maps.items()}


def _check_float(pipe: Any, name: str, part: nn.Module) -> None:
    """Refuse a component that has quantized layers: the float weights are gone."""
    if not (layers := quantized_layers(part)):
        return
    stored = getattr(getattr(part, "config", None), "quantization_config", None) or {}
    recipe = (stored if isinstance(stored, Mapping) else stored.to_dict()).get("recipe") or {}
    how = f" by recipe '{recipe['name']}'" if recipe.get("name") else ""
    source = origin_of(pipe)
    again = f": reelquant.open_pipeline('{source}')" if source else ""
    raise UnsupportedError(
        f"component '{name}' is quantized already ({len(layers)} layers{how}), and its float weights are gone; open the float pipeline "
        f"again{again}"
    )
