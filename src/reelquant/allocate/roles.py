"""Which roles of layers hold the damage: what layers are for, not what they are called."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from reelquant.allocate.sizes import weight_bits
from reelquant.allocate.table import LayerFacts, Measure, SensitivityTable


@dataclass(frozen=True)
class RoleShare:
    """The layers of one role.

    Attributes:
        role: see :func:`role_of`.
        layers: how many.
        weights: their share of all weights.
        damage: their share of all damage, each layer alone.
        worst: names of the layers with most damage, most first.
    """

    role: str
    layers: int
    weights: float
    damage: float
    worst: tuple[str, ...]

    @property
    def per_weight(self) -> float:
        """Damage of a weight over that of a weight anywhere: above one is sensitive."""
        return self.damage / self.weights if self.weights else 0.0


def role_of(layer: LayerFacts) -> str:
    """What a layer is for: its role, and of layers that follow the latent whether they belong to attention over the prompt."""
    return f"{layer.role}, cross attention" if layer.cross and layer.role == "main" else layer.role


def nearest_four(table: SensitivityTable, measure: Measure | None = None) -> str:
    """The weight format whose bits are nearest to four: what layers are ranked by."""
    return min(table.formats("weight", measure or table.measures[0]), key=lambda one: abs(weight_bits(one) - 4))


def role_shares(table: SensitivityTable, measure: Measure | None = None) -> list[RoleShare]:
    """The roles of a table, those with most damage first, by the weight format that is nearest to four bits."""
    fmt, rows = nearest_four(table, measure), table.select(measure)
    weights, damage, members = Counter[str](), Counter[str](), defaultdict[str, list[LayerFacts]](list)
    for layer in table.layers:
        role = role_of(layer)
        members[role].append(layer)
        weights[role] += layer.weights
        damage[role] += rows[layer.component, layer.name, fmt].damage  # type: ignore[assignment]
    whole, many = sum(damage.values()) or 1.0, sum(weights.values()) or 1
    found = []
    for role, layers in members.items():
        ordered = sorted(layers, key=lambda layer: -rows[layer.component, layer.name, fmt].damage)
        found.append(RoleShare(role, len(layers), weights[role] / many, damage[role] / whole, tuple(one.name for one in ordered)))
    return sorted(found, key=lambda one: -one.damage)
