"""A recipe: which numbers each layer gets, which rewrites come first, which solver picks the codes, how calibration samples.

Recipes are YAML; every key is checked, and an unknown one is an error with its place and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from reelquant._errors import RecipeError, nearest
from reelquant.clock import Inputs
from reelquant.formats import RANGES, QuantSpec, RangeRule, parse_format, parse_granularity
from reelquant.kernels.attention_quant import AttentionQuant, Scores, Values
from reelquant.solvers import SOLVERS, Solver
from reelquant.transforms import TRANSFORMS, Transform


class _Loader(yaml.SafeLoader):
    """YAML 1.2 booleans: only true and false, so that the key ``on`` stays a word."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tTfF"))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorRecipe(_Strict):
    """Numbers of one tensor: ``{format: int8, granularity: channel, range: mse}``.

    A list of formats is a choice that the range's criterion makes. ``range`` is a name, or a mapping with ``name`` and its parameters.
    """

    format: str | list[str]
    granularity: str = "tensor"
    range: str | dict[str, Any] = "minmax"
    slots: Literal["shared", "per_step"] = "shared"
    dynamic: bool = False

    @model_validator(mode="after")
    def _names_exist(self) -> TensorRecipe:
        self.spec()
        return self

    def spec(self, axis: int = 0) -> QuantSpec:
        """The specification these words mean; ``axis`` is the channel axis."""
        first, *others = [self.format] if isinstance(self.format, str) else self.format
        return QuantSpec(
            parse_format(first), parse_granularity(self.granularity, axis), self._range(), self.slots, self.dynamic,
            tuple(parse_format(name) for name in others),
        )  # fmt: skip

    def _range(self) -> RangeRule:
        options = {"name": self.range} if isinstance(self.range, str) else dict(self.range)
        name = options.pop("name", "minmax")
        return _construct("range", name, RANGES, options)


class Defaults(_Strict):
    """What a quantized layer gets if no rule says otherwise. ``input: null`` leaves inputs float (weight-only)."""

    weight: TensorRecipe
    input: TensorRecipe | None = None


class Rule(_Strict):
    """An exception for the layers that ``on`` matches; later rules win, key by key."""

    on: str
    keep: bool | None = None
    because: str | None = None
    weight: TensorRecipe | None = None
    input: TensorRecipe | None = None


class Calibrate(_Strict):
    """How calibration samples.

    Attributes:
        prompts: how many texts; more different words and motions matter more than more steps.
        steps: denoising steps; null: the pipeline's usual number.
        seed: seed of the first clip.
        ranges: ``seen`` covers what calibration saw; ``unseen`` adds headroom for later clips to channels whose range varies between runs.
    """

    prompts: int = Field(default=16, ge=1)
    steps: int | None = Field(default=None, ge=1)
    seed: int = 0
    ranges: Literal["seen", "unseen"] = "seen"

    @property
    def batch(self) -> int:
        """Clips per run of the sampler: at least four runs if there are prompts enough, so that ranges can be compared between runs."""
        return max(1, min(4, self.prompts // 4))


class Search(_Strict):
    """How choices (parameters given as lists) are made: by the error of whole sampled trajectories on prompts not used for calibration.

    Attributes:
        prompts: how many held-out texts.
        steps: denoising steps of a trial.
        scope: ``model`` makes one choice for all layers, ``family`` refines it for layers that share a name up to block numbers.
    """

    prompts: int = Field(default=4, ge=1)
    steps: int = Field(default=6, ge=1)
    scope: Literal["model", "family"] = "model"


class Protect(_Strict):
    """Denoising steps that get more precise activations, from the same stored weights.

    Attributes:
        steps: of the sampler that calibrates, from 0, or from -1 backwards; or ``auto``: found by what each does to held-out clips.
        inputs: ``float`` rounds no inputs at these steps, ``8-bit`` rounds them to eight bits where the recipe says fewer.
        share: ``auto`` protects at most this share of the steps.
    """

    steps: tuple[int, ...] | Literal["auto"] = "auto"
    inputs: Inputs = "float"
    share: float = Field(default=0.2, gt=0, le=1)


class Attention(_Strict):
    """Numbers of attention's two products, found in the forward: nothing is calibrated, and protected steps round none.

    Attributes:
        scores: of queries, and of keys less their mean, with one scale per token.
        values: ``float``, or ``e4m3`` for the weights and, with one scale per channel, the values.
    """

    scores: Scores = "int8"
    values: Values = "float"

    @property
    def numbers(self) -> AttentionQuant:
        """As kernels take them."""
        return AttentionQuant(self.scores, self.values)


class Step(_Strict):
    """One thing done to the layers that ``on`` matches: ``{transform: shift, center: mid}`` or ``{solve: gptq}``.

    Every further key is a parameter of the mechanism; a list of values is a choice that :class:`Search` makes.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    transform: str | None = None
    solve: str | None = None
    correct_bias: bool = False
    on: str = "role:main | role:entry | role:exit"

    @model_validator(mode="after")
    def _one_known_mechanism(self) -> Step:
        if (self.transform is None) == (self.solve is None):
            raise RecipeError("a step names exactly one mechanism: 'transform: NAME' or 'solve: NAME'")
        choices = self.choices()
        if not choices:
            raise RecipeError("an empty list leaves nothing to choose from")
        for options in choices:
            self.mechanism(options)
        return self

    def choices(self) -> list[dict[str, Any]]:
        """Every combination of the parameters that are given as lists; one element if there is nothing to choose."""
        found: list[dict[str, Any]] = [{}]
        for key, value in (self.model_extra or {}).items():
            values = value if isinstance(value, list) else [value]
            found = [{**partial, key: one} for partial in found for one in values]
        return found

    def mechanism(self, options: dict[str, Any]) -> Transform | Solver:
        """The transform or solver with these parameters."""
        if self.transform is not None:
            return _construct("transform", self.transform, TRANSFORMS, options)
        return _construct("solver", self.solve or "", SOLVERS, options)


LATER: dict[str, Any] = {"protect_steps": None, "guidance": "joint", "attention": None}
"""Keys that recipes did not have at first, with what they mean when they are not there: recipes without them keep their digest."""


class Recipe(_Strict):
    """A whole method. See ``docs/adding-a-method.md``.

    Attributes:
        temporal: ``quantize`` temporal layers like the rules say, or also store their exact outputs for the
            sampler's own steps (``table``).
        protect_steps: ``[0, 1, -1]``, ``auto``, or a :class:`Protect`; None for none.
        guidance: ``apart`` gives static inputs one scale for the first half of a classifier-free guidance pair and one for the second.
        attention: an :class:`Attention`; None leaves attention in float.
    """

    name: str
    summary: str = ""
    paper: str | None = None
    defaults: Defaults
    rules: tuple[Rule, ...] = ()
    steps: tuple[Step, ...] = ()
    calibrate: Calibrate | None = Calibrate()
    search: Search = Search()
    temporal: Literal["quantize", "table"] = "quantize"
    protect_steps: Protect | None = None
    guidance: Literal["joint", "apart"] = "joint"
    attention: Attention | None = None

    @property
    def attention_numbers(self) -> AttentionQuant | None:
        """What attention rounds, or None."""
        return self.attention and self.attention.numbers

    @field_validator("protect_steps", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"steps": value} if isinstance(value, str | list | tuple) else value

    @field_validator("steps")
    @classmethod
    def _one_solver(cls, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        solved = [step.on for step in steps if step.solve]
        if len(solved) != len(set(solved)):
            raise RecipeError("two solve steps for the same layers: keep one")
        return steps

    @model_validator(mode="after")
    def _has_data(self) -> Recipe:
        if self.calibrate is None:
            hungry = [step for step in self.steps if step.transform or step.mechanism(step.choices()[0]).needs]
            wants = [f"'{step.transform or step.solve}'" for step in hungry] + (["'temporal: table'"] if self.temporal == "table" else [])
            wants += ["'protect_steps'"] if self.protect_steps else []
            wants += ["'guidance: apart'"] if self.guidance == "apart" else []
            if wants:
                raise RecipeError(f"{wants[0]} needs statistics, and 'calibrate: null' gathers none; give calibrate: {{prompts: 16}}")
        return self

    @property
    def data_free(self) -> bool:
        """True if nothing has to be sampled."""
        return self.calibrate is None

    def digest(self) -> str:
        """Hash of the content, stored with every result."""
        content = self.model_dump(mode="json")
        content = {key: value for key, value in content.items() if key not in LATER or value != LATER[key]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _construct(kind: str, name: str, table: dict[str, Any], options: dict[str, Any]) -> Any:
    """Build a mechanism from its name and parameters; errors name the nearest valid word."""
    if name not in table:
        raise RecipeError(f"unknown {kind} '{name}'; {nearest(name, table)}")
    known = {field.name: field.default for field in dataclasses.fields(table[name])}
    for key, value in options.items():
        if key not in known:
            raise RecipeError(f"{kind} '{name}' has no parameter '{key}'; {nearest(key, known) if known else 'it has none'}")
        if not _same_kind(value, known[key]):
            raise RecipeError(f"{key} of {kind} '{name}' is like {known[key]!r} in kind, got {value!r}")
    return table[name](**options)


def _same_kind(value: Any, default: Any) -> bool:
    """Numbers for numbers, words for words; a default of None stands for a number that may be missing."""
    if default is None or (isinstance(default, float) and not isinstance(value, str)):
        return value is default or (isinstance(value, int | float) and not isinstance(value, bool))
    return type(value) is type(default)


def names() -> list[str]:
    """The recipes that come with the library."""
    files = resources.files("reelquant.recipes").joinpath("library").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_recipe(source: str | Path | dict[str, Any] | Recipe, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe by library name, from a YAML file, or from a mapping, and apply dotted overrides.

    Args:
        source: ``"qvd-w8a8"``, ``"my.yaml"``, a dict, or a recipe.
        overrides: ``{"calibrate.steps": 10, "defaults.weight.format": "int4"}``; list items by number, ``rules.0.keep``.

    Raises:
        RecipeError: naming the place, the value, and what would work.
    """
    data, where = _read(source)
    for key, value in (overrides or {}).items():
        _override(data, key, value)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_explain(error, where)) from None


def _read(source: str | Path | dict[str, Any] | Recipe) -> tuple[dict[str, Any], str]:
    if isinstance(source, Recipe):
        return source.model_dump(mode="json", exclude_unset=True), source.name
    if isinstance(source, dict):
        return json.loads(json.dumps(source)), str(source.get("name", "recipe"))
    text = str(source)
    if text in names():
        content = resources.files("reelquant.recipes").joinpath("library", f"{text}.yaml").read_text()
    elif Path(text).suffix in (".yaml", ".yml", ".json"):
        if not Path(text).is_file():
            raise RecipeError(f"recipe file '{text}' does not exist")
        content = Path(text).read_text()
    else:
        raise RecipeError(f"no recipe is called '{text}'; {nearest(text, names())} (or give a .yaml file)")
    try:
        data = yaml.load(content, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{text} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{text} holds no recipe: expected a mapping with 'name' and 'defaults', got {type(data).__name__}")
    return data, text


def parse_value(text: str) -> Any:
    """One value as a recipe would read it: ``10``, ``true``, ``int4``, ``[0.5, 1.0]``, ``null``."""
    return yaml.load(text, _Loader)


def _override(data: dict[str, Any], key: str, value: Any) -> None:
    node: Any = data
    *parents, last = key.split(".")
    for part in parents:
        node = node[_index(node, part, key)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise RecipeError(f"cannot set '{key}': '{part}' is {node!r}, not a mapping")
    node[_index(node, last, key) if isinstance(node, list) else last] = value


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        items = f"not one of the {len(node)} items (0 to {len(node) - 1})" if node else "not there: the list is empty"
        raise RecipeError(f"cannot set '{key}': '{part}' is {items}")
    return int(part)


def _explain(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        model = _model_at(first["loc"][:-1])
        return f"{where}: unknown key '{place}'; {nearest(str(first['loc'][-1]), model.model_fields)}"
    return f"{where}: {place}: {first['msg']}, got {first['input']!r:.80}"


def _model_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    """The model that a validation error's location points into."""
    parts: dict[str, type[BaseModel]] = {
        "defaults": Defaults,
        "rules": Rule,
        "steps": Step,
        "calibrate": Calibrate,
        "search": Search,
        "protect_steps": Protect,
        "attention": Attention,
        "weight": TensorRecipe,
        "input": TensorRecipe,
    }
    named = [parts[part] for part in location if isinstance(part, str) and part in parts]
    return named[-1] if named else Recipe
