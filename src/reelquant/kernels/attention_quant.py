"""What attention may be asked to round: the operands of its two products. It changes results, so a recipe or the user must ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from reelquant._errors import RecipeError, nearest

Scores = Literal["int8", "int4", "float"]  # of queries and keys
Values = Literal["float", "e4m3", "uint8", "uint4", "log2_3", "log2_4", "log2_5", "log2_6", "log2_7", "log2_8"]  # of weights and values
Smooth = Literal["auto", "keys", "both"]
FirstKey = Literal["rounded", "float"]
FLOAT = "float"  # the word for attention that rounds nothing


@dataclass(frozen=True)
class AttentionQuant:
    """Numbers of attention's two products.

    Attributes:
        scores: queries and keys, with one scale per token; ``float`` leaves the first product as it is.
        values: numbers of the second product. ``float`` leaves it as it is; ``e4m3`` rounds the weights, and the values with one scale per
            channel; ``uint8`` and ``uint4`` round the weights, and the values to int8 with one scale per channel; ``log2_4`` rounds the
            weights to powers of two, ``2**-n`` of the largest one of a query, ``n`` in so many bits, and leaves the values float.
        smooth: what is subtracted before scores are rounded: the mean of the ``keys`` over all tokens, or of ``both``, then the mean of
            every 128 queries, whose exact scores are added again. ``auto``: ``both`` for int4.
        first_key: ``float`` leaves the weight of the first key unrounded, which is that of a text's start.
    """

    scores: Scores = "int8"
    values: Values = "float"
    smooth: Smooth = "auto"
    first_key: FirstKey = "rounded"

    def __str__(self) -> str:
        smooth = "" if self.smooth == "auto" else f", {self.smooth} smoothed"
        return f"{self.scores} scores, {self.values} values{smooth}{', first key in float' if self.first_key == FLOAT else ''}"

    @property
    def smooths_queries(self) -> bool:
        """Whether queries lose their mean before they are rounded."""
        return self.smooth == "both" or (self.smooth == "auto" and self.scores == "int4")

    def to_json(self) -> dict[str, str]:
        """As recipes and checkpoints write it; words of later versions only where they say something."""
        plain = {field.name: field.default for field in fields(self)}
        return {key: word for key, word in asdict(self).items() if key in ("scores", "values") or word != plain[key]}


WORDS: dict[str, tuple[str, ...]] = {
    "scores": get_args(Scores),
    "values": get_args(Values),
    "smooth": get_args(Smooth),
    "first_key": get_args(FirstKey),
}


@dataclass(frozen=True)
class AttentionRule:
    """Numbers for some of a denoiser's attention; of several rules that match, the last one holds.

    Attributes:
        on: a pattern of :func:`reelquant.sites.matches`, over the modules that ask for attention.
        numbers: what is rounded there; None rounds nothing.
        steps: start and end of a part of the trajectory, as fractions of its steps; None for all of it.
        others: numbers that may take the place of ``numbers``: every place and step gets those of all that suit it best.
    """

    on: str
    numbers: AttentionQuant | None
    steps: tuple[float, float] | None = None
    others: tuple[AttentionQuant, ...] = ()

    @property
    def candidates(self) -> tuple[AttentionQuant, ...]:
        """All that may be chosen."""
        return self.others if self.numbers is None else (self.numbers, *self.others)


Asked = AttentionQuant | tuple[AttentionRule, ...] | None
"""What a recipe may ask of attention: the same everywhere, rules, or nothing."""


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
        raise RecipeError(f"attention is '{FLOAT}', a mapping like {AttentionQuant().to_json()} or a list of rules, got {value!r}")
    for key, word in value.items():
        if key not in WORDS:
            raise RecipeError(f"attention has no key '{key}'; {nearest(str(key), WORDS)}")
        if word not in WORDS[key]:
            raise RecipeError(f"attention.{key} is one of {', '.join(WORDS[key])}, got {word!r}")
    found = AttentionQuant(**value)
    if found.first_key == FLOAT == found.values:
        raise RecipeError("attention.first_key is 'float', and values: float rounds no weight; give values, or leave first_key out")
    if found.smooth != "auto" and found.scores == FLOAT:
        raise RecipeError(f"attention.smooth is '{found.smooth}', and scores: float rounds none; give scores, or leave smooth out")
    return None if found.scores == FLOAT == found.values else found


def parse_asked(value: Any) -> Asked:
    """:func:`parse_attention`, or a list of rules: the same mappings with ``on``, and ``steps`` if they do not hold for all.

    A list of ``values`` is a choice, see :class:`AttentionRule`.

    Raises:
        RecipeError: naming the rule, the key or value, and what would work.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_rule(one, f"attention.{number}") for number, one in enumerate(value))
    return parse_attention(value)


def _rule(value: Any, where: str) -> AttentionRule:
    if isinstance(value, AttentionRule):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("on"), str):
        raise RecipeError(f"{where} is a rule like {{'on': 'role:cross', 'scores': 'int8'}}, got {value!r:.100}")
    numbers = {key: word for key, word in value.items() if key not in ("on", "steps")}
    several = numbers.get("values") if isinstance(numbers.get("values"), list | tuple) else None
    try:
        if several is None:
            return AttentionRule(value["on"], parse_attention(numbers), _steps(value.get("steps")))
        found = [parse_attention(numbers | {"values": word}) for word in several]
        chosen = [one for one in found if one is not None]
        if len(chosen) < 2 or len(chosen) != len(found):
            raise RecipeError(f"values that are a choice are two or more that round something, got {several!r:.60}")
        return AttentionRule(value["on"], chosen[0], _steps(value.get("steps")), tuple(chosen[1:]))
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _steps(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    numbers = isinstance(value, list | tuple) and len(value) == 2 and all(type(one) in (int, float) for one in value)
    if not numbers or not 0 <= value[0] < value[1] <= 1:
        raise RecipeError(f"steps are the start and end of a part of the trajectory, like [0.0, 0.2], got {value!r:.60}")
    return float(value[0]), float(value[1])


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
