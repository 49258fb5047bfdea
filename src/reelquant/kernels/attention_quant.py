"""What attention may be asked to round: the operands of its two products. It changes results, so a recipe or the user must ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from reelquant._errors import RecipeError, nearest

Scores = Literal["int8"]  # of queries and keys
Values = Literal["float", "e4m3"]  # of weights and values
FLOAT = "float"  # the word for attention that rounds nothing


@dataclass(frozen=True)
class AttentionQuant:
    """Numbers of attention's two products.

    Attributes:
        scores: queries, and keys less their mean, with one scale per token.
        values: ``float`` leaves the second product as it is; ``e4m3`` rounds the weights, and the values with one scale per channel.
    """

    scores: Scores = "int8"
    values: Values = "float"

    def __str__(self) -> str:
        return f"{self.scores} scores, {self.values} values"

    def to_json(self) -> dict[str, str]:
        """As recipes and checkpoints write it."""
        return asdict(self)


WORDS: dict[str, tuple[str, ...]] = {"scores": get_args(Scores), "values": get_args(Values)}


def parse_attention(value: Any) -> AttentionQuant | None:
    """What ``{"scores": "int8", "values": "e4m3"}`` asks for; ``"float"`` asks for no rounding and gives None.

    Raises:
        RecipeError: naming the key or value, and the nearest one that works.
    """
    if value == FLOAT:
        return None
    if isinstance(value, AttentionQuant):
        return value
    if not isinstance(value, Mapping):
        raise RecipeError(f"attention is '{FLOAT}' or a mapping like {AttentionQuant().to_json()}, got {value!r}")
    for key, word in value.items():
        if key not in WORDS:
            raise RecipeError(f"attention has no key '{key}'; {nearest(str(key), WORDS)}")
        if word not in WORDS[key]:
            raise RecipeError(f"attention.{key} is one of {', '.join(WORDS[key])}, got {word!r}")
    return AttentionQuant(**value)


def over_keys(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether a mask says the same to all queries, as one of padded texts does: ``[1 or batch, 1 or heads, 1, keys]``."""
    if mask.ndim != 4 or query.ndim != 4 or mask.shape[2:] != (1, key.shape[2]):
        return False
    return all(size in (1, whole) for size, whole in zip(mask.shape[:2], query.shape[:2], strict=True))


def key_bias(mask: Tensor | None) -> Tensor | None:
    """What such a mask adds to the scores of a key: ``[1 or batch, 1 or heads, keys]`` float32; minus infinity for False."""
    if mask is None:
        return None
    bias = mask if mask.is_floating_point() else torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
    return bias[:, :, 0].float()
