"""A format for every layer under a budget of bits: where allocation plugs in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from reelquant._errors import RecipeError, nearest
from reelquant.allocate import METHODS, SensitivityTable, allocate
from reelquant.allocate.budget import reach
from reelquant.planning.parts import Part
from reelquant.recipes.allocated import allocated
from reelquant.recipes.recipe import Recipe, load_recipe

BASE = "mixed-w4.5a8"  # a recipe of the library with one allocator
USUAL, LOW = ("int4/group-64", "int6/channel", "int8/channel"), ("int3/group-64", "int4/group-64")
MEASURED = (LOW[0], *USUAL)
"""Formats that a map is measured with for a plan: by gradients, one more costs next to nothing."""
LEAST, MOST = 3.26, 8.0  # bits per weight with scales: all layers in the smallest format, and in the largest
TURN = 4.26  # bits below which formats of three bits are needed


@dataclass(frozen=True, eq=False)
class Formats:
    """Who gives the layers of the denoisers their formats.

    Attributes:
        table: what rounding each layer does to this model. None: that is measured while quantizing, on the output of recorded calls, and
            the recipes have a step that does so.
        method: how a budget is divided, of :data:`reelquant.allocate.METHODS`.
    """

    table: SensitivityTable | None = None
    method: str = "milp"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(f"unknown method '{self.method}' of allocation; {nearest(self.method, METHODS)}")

    @property
    def reach(self) -> tuple[float, float]:
        """Fewest and most bits per weight that formats have, with scales."""
        return (LEAST, MOST) if self.table is None else reach(self.table)

    def check_bits(self, bits: float) -> None:
        """Refuse bits that no mixture of the formats has.

        Raises:
            RecipeError: naming the fewest and the most.
        """
        least, most = self.reach
        if not least - 0.01 <= bits <= most + 0.01:
            ends = f"{math.ceil(100 * least) / 100:g} and {most:.2f}"
            raise RecipeError(f"--bits lies between {ends} bits per weight with scales, got {bits:g}")

    def recipes(self, bits: float, components: Iterable[str]) -> dict[str, Recipe]:
        """A recipe for each denoiser, together ``bits`` per weight on average, or a little less.

        Raises:
            RecipeError: for bits that no mixture of the formats has.
        """
        self.check_bits(bits)
        least, most = self.reach
        if self.table is None:
            return dict.fromkeys(components, _chosen_later(round(bits, 2), self.method))
        found = allocate(self.table, bits=min(max(bits, least), most), method=self.method, formats=self._formats(self.table, bits))
        name = f"planned-w{bits:.2f}".rstrip("0").rstrip(".") + "a8"
        return {one: allocated(BASE, found.of(one), found.skipped[one], name) for one in components if self.table.of(one)}

    @staticmethod
    def _formats(table: SensitivityTable, bits: float) -> tuple[str, ...] | None:
        """Those whose codes kernels multiply as they are, where they reach so few bits; else all of the table."""
        usual = [one for one in table.formats("weight", table.measures[0]) if one in USUAL]
        return tuple(usual) if len(usual) > 1 and reach(table, usual)[0] <= bits <= reach(table, usual)[1] else None

    def check(self, component: str, layers: Mapping[str, nn.Module]) -> None:
        """Refuse a map of another model.

        Raises:
            RecipeError: naming the first layer that is not there, or has another shape.
        """
        for layer in () if self.table is None else self.table.of(component):
            own = getattr(layers.get(layer.name), "weight", None)
            if own is None or tuple(own.shape) != layer.shape:
                here = "there is none" if own is None else f"here it has {tuple(own.shape)}"
                raise RecipeError(
                    f"the map of '{self.table and self.table.model}' is of another model: layer '{layer.name}' of '{component}' has a "
                    f"weight of {layer.shape} there, and {here}; name the folder of its own map, or leave --map out"
                )


def measuring_bytes(parts: Mapping[str, Part]) -> int:
    """Memory that measuring a map takes, about: the pipeline in float32, and a rounding error for every weight and format beside it."""
    numbers = {name: sum(weight.numel() for weight in part.model.parameters()) for name, part in parts.items()}
    return 4 * (sum(numbers.values()) + len(MEASURED) * sum(numbers[name] for name, part in parts.items() if part.denoises))


def _chosen_later(bits: float, method: str) -> Recipe:
    """The recipe that has formats chosen while it quantizes, from the damage that each is measured to do."""
    changes = {"bits": bits, "formats": list(USUAL if bits >= TURN else LOW)}
    recipe = load_recipe(BASE).model_dump(mode="json", exclude_unset=True)
    steps = [{"allocate": method, **changes} if "allocate" in step else step for step in recipe["steps"]]
    return load_recipe({"extends": BASE, "name": f"planned-w{bits:g}a8", "steps": steps})
