"""The ``quantization_config`` that users write and checkpoints carry. Imports nothing heavy: ``reelquant.ReelQuantConfig`` is here."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reelquant._errors import RecipeError, nearest

if TYPE_CHECKING:
    from reelquant.recipes.recipe import Recipe

METHOD = "reelquant"
STORED = "config_groups"  # the key by which the description of a quantized model is told from a wish
OPTIONS = ("modules_to_not_convert", "modules_dtype_dict", "group_size")


class Method(str, Enum):
    """diffusers wants an enum member with ``.value``."""

    REELQUANT = METHOD


class ReelQuantConfig:
    """Quantize a model while ``from_pretrained`` loads it, in diffusers and in transformers.

    One class for both libraries: they ask for these methods and attributes and for no base class, and neither has to be imported.

    Args:
        recipe: a name from ``reelquant recipes``, a YAML file, a mapping or a :class:`~reelquant.recipes.recipe.Recipe`. It must be
            data-free (``w8a16``, ``w4a16``); :func:`reelquant.quantize` follows those that calibrate.
        modules_to_not_convert: modules that stay float: ``"proj_out"`` or ``"attn1.to_q"`` wherever that path occurs, or a pattern of
            :func:`reelquant.sites.matches` (``"blocks.0.*"``, ``"re:..."``, ``"role:temporal"``).
        modules_dtype_dict: number format -> modules that get it, ``{"int8": ["*.to_q"], "int4": ["ffn"]}``, named in the same ways.
        group_size: how many weights of a row share a scale; -1 for one scale per output channel.
        content: what a checkpoint stores about a quantized model; filled when it is loaded, not by hand.

    Attributes:
        from_file: whether this was read from a checkpoint, or at least from plain data.

    Raises:
        RecipeError: if the recipe or an option says something impossible.

    Example:
        >>> from diffusers import AutoModel
        >>> config = ReelQuantConfig("w8a16", modules_to_not_convert=["proj_out"])
        >>> AutoModel.from_pretrained(folder, subfolder="transformer", quantization_config=config, dtype=torch.bfloat16)
    """

    def __init__(
        self,
        recipe: str | Path | Mapping[str, Any] | Recipe = "w8a16",
        modules_to_not_convert: Sequence[str] | None = None,
        modules_dtype_dict: Mapping[str, Sequence[str]] | None = None,
        group_size: int | None = None,
        quant_method: str = METHOD,
        **content: Any,
    ) -> None:
        from reelquant.integrations.options import check
        from reelquant.recipes.recipe import load_recipe

        self.quant_method, self.from_file = Method(quant_method), False
        self.modules_to_not_convert, self.modules_dtype_dict = _plain(modules_to_not_convert), _plain(modules_dtype_dict)
        self.group_size, self.content = group_size, content
        if self.stored:  # a newer version may have followed a recipe that this one cannot read; the layers are described without it
            self.recipe: Any = copy.deepcopy(recipe)
            return
        for key in content:
            raise RecipeError(f"ReelQuantConfig has no option '{key}'; {nearest(key, ('recipe', *OPTIONS))}")
        self.recipe = load_recipe(recipe if not isinstance(recipe, Mapping) else dict(recipe))
        check(modules_to_not_convert, modules_dtype_dict, group_size)

    @property
    def stored(self) -> bool:
        """Whether this describes a model that is quantized already."""
        return STORED in self.content

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        recipe = self.recipe if self.stored else self.recipe.model_dump(mode="json", exclude_unset=True)
        options = {key: getattr(self, key) for key in OPTIONS if getattr(self, key) is not None}
        return copy.deepcopy({"quant_method": METHOD, "recipe": recipe, **options, **self.content})

    to_diff_dict = to_dict

    def to_json_string(self, use_diff: bool = True) -> str:
        """The same as text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read :meth:`to_dict` back; keys of newer versions are kept. ``return_unused_kwargs`` is how the two libraries call it."""
        told = copy.deepcopy(dict(config_dict))
        if STORED in told:
            config = cls(**{"recipe": {}} | told)
        else:
            known = {key: told.pop(key) for key in ("recipe", "quant_method", *OPTIONS) if key in told}
            config = cls(**known)
            config.content = told
        config.from_file = True
        return (config, kwargs) if return_unused_kwargs else config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReelQuantConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        name = self.recipe.get("name") if isinstance(self.recipe, Mapping) else self.recipe.name
        options = "".join(f", {key}={getattr(self, key)!r}" for key in OPTIONS if getattr(self, key) is not None)
        layers = f", {len(self.content[STORED])} kinds of layers" if self.stored else ""
        return f"ReelQuantConfig(recipe={name!r}{options}{layers})"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def data_free(recipe: Recipe) -> Recipe:
    """The recipe, if it can be followed while loading.

    Raises:
        RecipeError: if it calibrates.
    """
    if not recipe.data_free:
        raise RecipeError(
            f"recipe '{recipe.name}' calibrates: it has to see the pipeline sample, and from_pretrained only loads; load the float "
            f"pipeline, call reelquant.quantize(pipe, '{recipe.name}') and reelquant.save(pipe, folder), and open that folder instead; "
            "w8a16 and w4a16 need no data"
        )
    return recipe
