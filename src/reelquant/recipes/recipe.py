"""A recipe: which numbers each layer gets, which stages work on it, how calibration samples.

Recipes are YAML; every key is checked, and an unknown one is an error with its place and the nearest valid name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from reelquant._errors import RecipeError, nearest
from reelquant._plugins import load_installed
from reelquant._remarks import remark
from reelquant.formats import RANGES, QuantSpec, RangeRule, parse_format, parse_granularity
from reelquant.recipes.axes import AXES, keyed_stages
from reelquant.recipes.bounds import CHOICES, plain, short
from reelquant.recipes.construct import construct
from reelquant.recipes.entry import Entry, make_entry
from reelquant.recipes.text import EXTENDS, extended, names, override, parse_value, read_text

__all__ = ["Calibrate", "Defaults", "Recipe", "Rule", "Search", "Step", "TensorRecipe", "load_recipe", "names", "parse_value"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorRecipe(_Strict):
    """Numbers of one tensor: ``{format: int8, granularity: channel, range: mse}``.

    Attributes:
        format: name of a number format; a list is a choice that the range's criterion makes.
        granularity: which values share a scale.
        range: how a scale is found: a name, or a mapping with ``name`` and its parameters.
        slots: ``shared`` has one set of scales, ``per_step`` one for each denoising step.
        dynamic: scales of inputs are found at run time instead of in calibration.
        scale: which numbers the scales of groups are: ``float``, ``e4m3`` (NVFP4) or ``e8m0`` (MX).
    """

    format: str | list[str]
    granularity: str = "tensor"
    range: str | dict[str, Any] = "minmax"
    slots: Literal["shared", "per_step"] = "shared"
    dynamic: bool = False
    scale: Literal["float", "e4m3", "e8m0"] = "float"

    @model_validator(mode="after")
    def _names_exist(self) -> TensorRecipe:
        self.spec()
        return self

    @model_serializer(mode="wrap")
    def _plain(self, content: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``scale: float``: recipes that do not use the key keep the digest that earlier versions gave them."""
        return {key: value for key, value in content(self).items() if (key, value) != ("scale", "float")}

    def spec(self, axis: int = 0) -> QuantSpec:
        """The specification these words mean; ``axis`` is the channel axis."""
        first, *others = [self.format] if isinstance(self.format, str) else self.format
        return QuantSpec(
            parse_format(first),
            parse_granularity(self.granularity, axis, self.scale),
            self._range(),
            self.slots,
            self.dynamic,
            tuple(parse_format(name) for name in others),
        )

    def _range(self) -> RangeRule:
        options = {"name": self.range} if isinstance(self.range, str) else dict(self.range)
        name = options.pop("name", "minmax")
        return construct("range", name, RANGES, options)


class Defaults(_Strict):
    """What a quantized layer gets if no rule says otherwise.

    Attributes:
        weight: numbers of the weight.
        input: numbers of the input; null leaves inputs float (weight-only).
    """

    weight: TensorRecipe
    input: TensorRecipe | None = None


class Rule(_Strict):
    """An exception for the layers that ``on`` matches; later rules win, key by key.

    Attributes:
        on: pattern of layers.
        skip: leave these layers float (``true``), or take an earlier rule's skip back (``false``). Older recipes say ``keep``.
        because: the reason, for reports.
        weight, input: other numbers than those of the defaults.
    """

    on: str
    skip: bool | None = None
    because: str | None = None
    weight: TensorRecipe | None = None
    input: TensorRecipe | None = None

    @model_validator(mode="before")
    @classmethod
    def _older_word(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "keep" not in data:
            return data
        return {"skip" if key == "keep" else key: value for key, value in data.items()}


class Calibrate(_Strict):
    """How calibration samples.

    Attributes:
        prompts: how many texts; more different words and motions matter more than more steps.
        probes: how many texts of random words of the pipeline's vocabulary on top, see :mod:`reelquant.models.probes`; null: one for
            every four prompts.
        steps: denoising steps; null: the pipeline's usual number.
        seed: seed of the first clip.
        ranges: ``seen`` covers what calibration saw; ``unseen`` adds headroom for later clips to channels whose range varies
            between runs.
    """

    prompts: int = Field(default=16, ge=1, le=100_000)
    probes: int | None = Field(default=None, ge=0, le=100_000)
    steps: int | None = Field(default=None, ge=1, le=100_000)
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    ranges: Literal["seen", "unseen"] = "seen"

    @property
    def probe_count(self) -> int:
        """How many probes are sampled."""
        return self.prompts // 4 if self.probes is None else self.probes

    @property
    def batch(self) -> int:
        """Clips per run of the sampler: at least four runs if there are prompts enough, so that runs can be compared."""
        return max(1, min(4, self.prompts // 4))


class Search(_Strict):
    """How choices (parameters given as lists) are made: by the error of sampled trajectories on prompts not used for calibration.

    Attributes:
        prompts: how many held-out texts.
        steps: denoising steps of a trial.
        scope: ``model`` makes one choice for all layers, ``family`` refines it for layers that share a name up to block numbers.
    """

    prompts: int = Field(default=4, ge=1, le=100_000)
    steps: int = Field(default=6, ge=1, le=100_000)
    scope: Literal["model", "family"] = "model"


class Step(_Strict):
    """One stage, for the layers that ``on`` matches: ``{transform: shift, center: mid}`` or ``{solve: gptq}``.

    One key names the axis and its value the stage; every further key is a parameter of the stage. A list of values is a choice
    that :class:`Search` makes.

    Attributes:
        on: pattern of the layers it is for; null: all that are quantized.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    on: str | None = None

    @model_validator(mode="after")
    def _one_known_stage(self) -> Step:
        if len([key for key in self.model_extra or {} if key in AXES]) != 1:
            raise RecipeError(f"a step names exactly one mechanism: {', '.join(f'{axis!r}' for axis in AXES)}, each with a NAME")
        self.entry(0)
        return self

    @property
    def axis(self) -> str:
        """The key of the step that names an axis."""
        return next(key for key in self.model_extra or {} if key in AXES)

    @property
    def mechanism(self) -> str:
        """The name of its stage."""
        return (self.model_extra or {})[self.axis]

    @property
    def options(self) -> dict[str, Any]:
        """Parameters as they are written."""
        return {key: value for key, value in (self.model_extra or {}).items() if key != self.axis}

    def entry(self, position: int) -> Entry:
        """The stage, ready to be planned."""
        return make_entry(position, self.axis, self.mechanism, self.options, self.on, f"'{self.mechanism}'")


class Recipe(_Strict):
    """A whole method. See ``docs/adding-a-method.md``.

    Beside the fields below, a recipe may have a top-level key for every stage that declares one (``temporal: table``,
    ``protect_steps: [0, -1]``, ``guidance: separate``, ``attention: {scores: int8}``): the short form of a step.

    Attributes:
        name: what reports call it.
        summary: one sentence on what it does.
        paper: where the method is from.
        ours: what differs from the paper.
        defaults: which numbers each layer gets.
        rules: which layers get others, or stay float.
        steps: the stages, in order.
        calibrate: how calibration samples; null for recipes that need no data, and :func:`load_recipe` sets it to null where sampling
            would change nothing.
        search: how choices are made.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    summary: str = ""
    paper: str | None = None
    ours: str = ""
    defaults: Defaults
    rules: tuple[Rule, ...] = ()
    steps: tuple[Step, ...] = ()
    calibrate: Calibrate | None = Calibrate()
    search: Search = Search()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        known = keyed_stages()
        for key in self.model_extra or {}:
            if key not in known:
                raise RecipeError(f"unknown key '{key}'; {nearest(key, [*type(self).model_fields, *known, EXTENDS])}")
        hungry = [entry.label for entry in self.entries if entry.stage.needs_data]
        if hungry and self.data_free:
            raise RecipeError(f"{hungry[0]} needs statistics, and 'calibrate: null' gathers none; give calibrate: {{prompts: 16}}")
        _check_once(self.entries)
        return self

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every stage: the steps in order, then those that top-level keys switch on."""
        entries = [step.entry(number) for number, step in enumerate(self.steps)]
        for key, value in (self.model_extra or {}).items():
            axis, name = keyed_stages()[key]
            options = AXES[axis].members[name].parse_key(value)
            if options is not None:
                label = f"'{key}: {value}'" if isinstance(value, str) else f"'{key}'"
                entries.append(make_entry(len(entries), axis, name, options, None, label))
        return tuple(entries)

    @property
    def uses_data(self) -> bool:
        """True if sampling would change the result: inputs that are rounded, stages that look at data, choices that trials make."""
        inputs = [self.defaults.input, *(rule.input for rule in self.rules)]
        stages = [entry.stage for entry in self.entries]
        looking = any(stage.needs_data or stage.statistics or stage.records for stage in stages)
        return any(inputs) or looking or any(len(entry.alternatives) > 1 for entry in self.entries)

    @property
    def data_free(self) -> bool:
        """True if nothing has to be sampled."""
        return self.calibrate is None

    def digest(self) -> str:
        """Hash of the content, stored with every result. Keys that switch nothing on do not count, nor do words about it."""
        content = self.model_dump(mode="json", exclude={"ours", "summary"})
        for key, value in (self.model_extra or {}).items():
            axis, name = keyed_stages()[key]
            if AXES[axis].members[name].parse_key(value) is None:
                del content[key]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _check_once(entries: Sequence[Entry]) -> None:
    """Refuse two exclusive stages of one axis for the same layers, and the same stage twice for the whole denoiser.

    The plan refuses exclusive stages that meet in some layers only.
    """
    first: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        stage = entry.stage
        if not stage.exclusive and stage.takes_on:
            continue
        kind = entry.axis if stage.exclusive else entry.name
        where = f"the layers '{entry.on}'" if stage.takes_on else "the whole denoiser"
        if (earlier := first.setdefault((kind, where), entry)) is not entry:
            raise RecipeError(f"two {kind} steps, {earlier.label} and {entry.label}, act on {where}: keep one")


def load_recipe(source: str | Path | dict[str, Any] | Recipe, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe by library name, from a YAML file, or from a mapping, and apply dotted overrides.

    Args:
        source: ``"qvd-w8a8"``, ``"my.yaml"``, a dict, or a recipe. Its key ``extends`` names a recipe that it changes.
        overrides: ``{"calibrate.steps": 10, "defaults.weight.format": "int4"}``; list items by number, ``rules.0.skip``.

    Raises:
        RecipeError: naming the place, the value, and what would work.
    """
    load_installed()
    data, where = _read(source)
    for key, value in (overrides or {}).items():
        override(data, key, plain(value, key))
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_explain(error, where)) from None
    if (count := math.prod(len(entry.alternatives) for entry in recipe.entries)) > CHOICES:
        raise RecipeError(f"{where}: the lists of its steps make {count} combinations, and each is a trial; leave at most {CHOICES}")
    return recipe if recipe.uses_data or recipe.data_free else _without_data(recipe)


def _without_data(recipe: Recipe) -> Recipe:
    """The recipe without the calibration that it does not need: sampling takes far longer than rounding weights."""
    if "calibrate" in recipe.model_fields_set:
        remark(f"recipe '{recipe.name}' rounds weights alone and no step of it looks at data, so nothing is sampled; drop its 'calibrate'")
    return recipe.model_copy(update={"calibrate": None})


def _read(source: str | Path | dict[str, Any] | Recipe) -> tuple[dict[str, Any], str]:
    if isinstance(source, Recipe):
        return source.model_dump(mode="json", exclude_unset=True), source.name
    if isinstance(source, dict):
        where = str(source.get("name", "recipe"))
        return extended(plain(source, where[:60]), Path(), (where,)), where
    return read_text(source), str(source)


def _explain(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    cause = first.get("ctx", {}).get("error")
    if first["type"] == "extra_forbidden":
        model = _model_at(first["loc"][:-1])
        return f"{where}: unknown key '{place}'; {nearest(str(first['loc'][-1]), model.model_fields)}"
    if isinstance(cause, RecipeError):
        return f"{where}: {place}: {cause}" if place else f"{where}: {cause}"
    return f"{where}: {place}: {first['msg']}, got {short(first['input'])}"


_PARTS: dict[str, type[BaseModel]] = {
    "defaults": Defaults,
    "rules": Rule,
    "steps": Step,
    "calibrate": Calibrate,
    "search": Search,
    "weight": TensorRecipe,
    "input": TensorRecipe,
}


def _model_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    """The model that a validation error's location points into."""
    named = [_PARTS[part] for part in location if isinstance(part, str) and part in _PARTS]
    return named[-1] if named else Recipe
