"""What rounding does to a model, layer by layer: the table that is measured once and read by everything that divides a budget of bits.

The file is JSON with a row per line, meant to be read and edited: ``skip`` and ``fixed`` are for people, docs/sensitivity.md describes
both. Numbers of format versions that are not known here are refused.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from reelquant._errors import CheckpointError, RecipeError, SiteError, nearest
from reelquant._numbers import is_number
from reelquant.allocate.sizes import check_weight
from reelquant.sites import ROLES, Role, matches, select

VERSION = 1
KIND = "reelquant sensitivity"
Measure = Literal["trajectory", "gradient", "noise"]
MEASURES: tuple[Measure, ...] = get_args(Measure)  # the most trusted one first
Part = Literal["weight", "input"]
PARTS: tuple[Part, ...] = get_args(Part)
HALVES = ("first", "second")
EVERY = "*"  # instead of a layer: all layers of the component at once
COLUMNS = ("component", "layer", "part", "format", "measure", "steps", "half", "damage", "low", "high")


@dataclass(frozen=True)
class LayerFacts:
    """One layer that was measured.

    Attributes:
        component: the denoiser that it belongs to.
        name: dotted path inside of the denoiser.
        kind: class name of the module.
        role: what its input depends on, see :class:`reelquant.sites.Layer`.
        shape: of the weight.
        block: the block of the denoiser that holds it; empty outside of blocks.
        cross: whether it belongs to attention that reads the prompt.
        last, end: whether it is at the end of the denoiser, see :class:`reelquant.sites.Layer`.
        products: multiplications of one clip in one step; 0 in tables of earlier versions, which did not count them.
    """

    roles: ClassVar[tuple[str, ...]] = ROLES
    component: str
    name: str
    kind: str
    role: Role
    shape: tuple[int, ...]
    block: str = ""
    cross: bool = False
    last: bool = False
    products: float = 0.0
    end: bool = False

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Damage:
    """What one change does to what the model makes: squared error of the final latents over their variance, mean over clips.

    Attributes:
        component: of the denoiser.
        layer: the only one that is changed, or :data:`EVERY`.
        part: whether its weight or its input is rounded.
        format: ``FORMAT/GRANULARITY``, as in ``int4/group-64``.
        measure: how it was found, see :mod:`reelquant.damage`.
        damage: unitless; 0 is lossless.
        low, high: 95 % interval over clips or recorded calls; both equal to ``damage`` where there is one of them only.
        steps: first and last denoising step (of the component's own, from 0) at which it is changed; None for all.
        half: the half of guidance pairs at which it is changed, ``first`` or ``second``; None for both.
    """

    component: str
    layer: str
    part: Part
    format: str
    measure: Measure
    damage: float
    low: float
    high: float
    steps: tuple[int, int] | None = None
    half: str | None = None


@dataclass(frozen=True)
class Configuration:
    """A format for every layer at once, and what that did to the final latents of the same clips.

    Attributes:
        component: the denoiser whose layers these are; the others were float.
        formats: weight format by layer.
        damage: as :attr:`Damage.damage`.
    """

    component: str
    formats: Mapping[str, str]
    damage: float


@dataclass(frozen=True)
class Tried:
    """A plan over steps and layers, and what it did to clips of other texts than those of the map.

    Attributes:
        component, part: as in :class:`Damage`; everything else was float.
        groups: names of layers (:data:`EVERY` for all), and their bits at every step.
        damage, low, high: as in :class:`Damage`.
    """

    component: str
    part: Part
    groups: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]
    damage: float
    low: float
    high: float


@dataclass(frozen=True)
class SensitivityTable:
    """Layers x formats (x steps x halves of guidance), each with its damage.

    Attributes:
        model: what was measured, in words for people (a bundled name, a folder).
        recipe: name of the recipe whose ranges and inputs were used.
        settings: clips, steps and everything else that the measurement depends on.
        timesteps: of every component, in sampling order.
        layers: all that were measured.
        rows: the damages.
        configurations: whole models that were tried.
        skip: patterns of layers that have to stay float; for people to edit.
        fixed: pattern -> weight format that its layers have to get; later ones win; for people to edit.
        together: (component, part, measure) -> ``[steps][steps]``, cosines between the errors of the final latents that rounding at two
            single steps makes, in the same format, all layers together; mean over formats and clips. Steps that were not compared
            have independent errors.
        tried: plans over steps and layers that were sampled.
    """

    model: str
    recipe: str
    layers: tuple[LayerFacts, ...]
    rows: tuple[Damage, ...] = ()
    configurations: tuple[Configuration, ...] = ()
    timesteps: Mapping[str, Sequence[float]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    fixed: Mapping[str, str] = field(default_factory=dict)
    together: Mapping[tuple[str, Part, Measure], Sequence[Sequence[float]]] = field(default_factory=dict)
    tried: tuple[Tried, ...] = ()

    # --- reading ------------------------------------------------------------------------------------------------------------

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the denoisers."""
        return tuple(dict.fromkeys(layer.component for layer in self.layers))

    @property
    def measures(self) -> tuple[Measure, ...]:
        """How damages of weights were measured, the most trusted way first."""
        found = {row.measure for row in self.rows if row.part == "weight" and row.layer != EVERY}
        return tuple(one for one in MEASURES if one in found)

    def formats(self, part: Part = "weight", measure: Measure | None = None) -> tuple[str, ...]:
        """The formats that rows of layers are about, by any measure or by one, in the order in which they were measured."""
        rows = (row for row in self.rows if row.part == part and row.layer != EVERY and measure in (None, row.measure))
        return tuple(dict.fromkeys(row.format for row in rows))

    def of(self, component: str) -> tuple[LayerFacts, ...]:
        """The layers of a component, in execution order.

        Raises:
            SiteError: if there is none of that name.
        """
        if component not in self.components:
            raise SiteError(f"the table of '{self.model}' has no component '{component}'; {nearest(component, self.components)}")
        return tuple(layer for layer in self.layers if layer.component == component)

    def select(
        self,
        measure: Measure | None = None,
        part: Part = "weight",
        steps: tuple[int, int] | None = None,
        half: str | None = None,
    ) -> dict[tuple[str, str, str], Damage]:
        """Rows by component, layer and format. Without a measure, the most trusted one that the table holds.

        Raises:
            RecipeError: if the table was not measured in this way.
        """
        chosen = self._measure(measure)
        wanted = (chosen, part, steps, half)
        return {(row.component, row.layer, row.format): row for row in self.rows if (row.measure, row.part, row.steps, row.half) == wanted}

    def _measure(self, measure: Measure | None) -> Measure:
        if measure is None and self.measures:
            return self.measures[0]
        if measure not in self.measures:
            raise RecipeError(
                f"the table of '{self.model}' holds no damages of weights measured by '{measure}'; it has: "
                f"{', '.join(self.measures) or 'none'}"
            )
        return measure

    def step_ranges(self, component: str, measure: Measure | None = None) -> tuple[tuple[int, int], ...]:
        """The ranges of steps that rows of layers are apart for, in order; none if no step was looked at by itself."""
        found = {
            row.steps
            for row in self.rows
            if row.component == component and row.layer != EVERY and row.steps is not None and measure in (None, row.measure)
        }
        return tuple(sorted(found))

    # --- what people wrote --------------------------------------------------------------------------------------------------

    def skipped(self, layer: LayerFacts) -> bool:
        """Whether a layer has to stay float."""
        return any(matches(pattern, layer) for pattern in self.skip)

    def fixed_format(self, layer: LayerFacts) -> str | None:
        """The format that a layer has to get, or None."""
        return next((fmt for pattern, fmt in reversed(self.fixed.items()) if matches(pattern, layer)), None)

    def edited(self, skip: Iterable[str] = (), fixed: Mapping[str, str] | None = None) -> SensitivityTable:
        """The table with further layers that stay float, and further layers with a fixed format.

        Raises:
            SiteError: for a pattern that matches no layer.
            RecipeError: for a format that no weight can have.
        """
        made = replace(self, skip=(*self.skip, *skip), fixed={**self.fixed, **(fixed or {})})
        made._check_edits()
        return made

    def _check_edits(self) -> None:
        for pattern in (*self.skip, *self.fixed):
            select(pattern, self.layers)
        for written in self.fixed.values():
            check_weight(written, "the key 'fixed' of a sensitivity table")

    # --- files --------------------------------------------------------------------------------------------------------------

    def to_text(self) -> str:
        """The file: settings first, then a row per line."""
        head = {
            "kind": KIND,
            "version": VERSION,
            "model": self.model,
            "recipe": self.recipe,
            "skip": list(self.skip),
            "fixed": dict(self.fixed),
            "settings": dict(self.settings),
            "timesteps": {name: list(values) for name, values in self.timesteps.items()},
        }
        blocks = {
            "layers": [json.dumps(asdict(layer)) for layer in self.layers],
            "columns": [json.dumps(name) for name in COLUMNS],
            "rows": [json.dumps(_line(row)) for row in self.rows],
            "configurations": [json.dumps(asdict(one)) for one in self.configurations],
            "together": [json.dumps([*key, [[round(one, 3) for one in row] for row in rows]]) for key, rows in self.together.items()],
        }
        if self.tried:
            blocks["tried"] = [json.dumps(asdict(one)) for one in self.tried]
        parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        parts += [
            f" {json.dumps(key)}: [\n  " + ",\n  ".join(lines) + "\n ]" if lines else f' "{key}": []' for key, lines in blocks.items()
        ]
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def as_saved(self) -> SensitivityTable:
        """The table with the digits that the file holds: what is planned from either is the same."""
        return _parsed(json.loads(self.to_text()))

    def save(self, file: str | Path) -> Path:
        """Write the file, complete or not at all.

        Raises:
            CheckpointError: if the place cannot be written to.
        """
        file = Path(file)
        partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(self.to_text(), encoding="utf-8")
            os.replace(partial, file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CheckpointError(f"cannot write '{file}': {error.strerror}; free space or choose another place") from error
        return file


def load_table(file: str | Path) -> SensitivityTable:
    """Read what :meth:`SensitivityTable.save` wrote, and people may have edited.

    Args:
        file: the file, or the folder in which ``reelquant sensitivity`` left it.

    Raises:
        CheckpointError: if it cannot be read, is not a sensitivity table, or is of a later version.
        SiteError: if a pattern of ``skip`` or ``fixed`` matches no layer.
        RecipeError: if a format of ``fixed`` cannot be a weight's.
    """
    file = Path(file)
    file = file / FILE if file.is_dir() else file
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read '{file}' ({error.strerror}); reelquant sensitivity MODEL -o FOLDER writes one") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{file}' is not JSON ({error}); correct the place, or measure again") from None
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise CheckpointError(f'\'{file}\' is not a sensitivity table (no "kind": "{KIND}"); reelquant sensitivity writes one')
    if data.get("version") != VERSION:
        raise CheckpointError(
            f"'{file}' has version {data.get('version')!r:.20}, and this release reads version {VERSION}; update reelquant"
        )
    try:
        made = _parsed(data)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(f"'{file}' is damaged ({type(error).__name__}: {error}); correct it, or measure again") from None
    made._check_edits()
    return made


FILE = "sensitivity.json"  # in the folder of a measurement


def _line(row: Damage) -> list[Any]:
    values = asdict(row)
    return [float(f"{values[name]:.5g}") if name in ("damage", "low", "high") else values[name] for name in COLUMNS]


def _parsed(data: Mapping[str, Any]) -> SensitivityTable:
    layers = tuple(LayerFacts(**layer | {"shape": tuple(layer["shape"])}) for layer in data["layers"])
    return SensitivityTable(
        str(data["model"]),
        str(data["recipe"]),
        layers,
        tuple(_row(dict(zip(data["columns"], row, strict=True))) for row in data["rows"]),
        tuple(Configuration(str(one["component"]), dict(one["formats"]), float(one["damage"])) for one in data["configurations"]),
        {str(name): [float(one) for one in values] for name, values in data["timesteps"].items()},
        dict(data["settings"]),
        tuple(_text(one, "skip") for one in data.get("skip", ())),
        {_text(key, "fixed"): _text(value, "fixed") for key, value in dict(data.get("fixed", {})).items()},
        dict(_cosines(data, *one) for one in data.get("together", ())),
        tuple(_tried(one) for one in data.get("tried", ())),
    )


def _tried(values: Mapping[str, Any]) -> Tried:
    groups = tuple((tuple(map(str, layers)), tuple(map(int, bits))) for layers, bits in values["groups"])
    figures = (values[name] for name in ("damage", "low", "high"))
    if values["part"] not in PARTS or not all(is_number(one) and one >= 0 for one in (values["damage"], values["low"], values["high"])):
        raise ValueError(f"'tried' holds {values['part']!r:.20} with a damage of {values['damage']!r:.20}")
    return Tried(str(values["component"]), values["part"], groups, *figures)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"'{key}' holds {value!r:.40}, which is not a text")
    return value


def _cosines(data: Mapping[str, Any], component: str, part: Any, measure: Any, rows: Any) -> tuple[tuple[str, Part, Measure], Any]:
    steps = len(data["timesteps"][component])
    if part not in PARTS or measure not in MEASURES:
        raise ValueError(f"'together' of {component!r:.40} is of {part!r:.20}, {measure!r:.20}")
    if len(rows) != steps or any(len(row) != steps or not all(is_number(one) and abs(one) <= 1 for one in row) for row in rows):
        raise ValueError(f"'together' of {component!r:.40} holds cosines between {steps} steps")
    return (component, part, measure), rows


def _row(values: dict[str, Any]) -> Damage:
    for name in ("damage", "low", "high"):
        if not is_number(values[name]) or values[name] < 0:
            raise ValueError(f"{name} of layer '{values['layer']}' is {values[name]!r:.30}, and a damage is a number from 0")
    for name, known in (("part", PARTS), ("measure", MEASURES), ("half", (None, *HALVES))):
        if values[name] not in known:
            raise ValueError(f"{name} of layer '{values['layer']}' is {values[name]!r:.30}, known: {known}")
    steps = values["steps"]
    return Damage(**values | {"steps": None if steps is None else (int(steps[0]), int(steps[1]))})
