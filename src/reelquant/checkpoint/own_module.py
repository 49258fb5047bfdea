"""A quantized module that is of no library: its tensors as safetensors, and a JSON file that describes its layers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reelquant._errors import CheckpointError, UnsupportedError
from reelquant.checkpoint.folder import OWN_INDEX, absolute, check_target, new_folder
from reelquant.checkpoint.save import REPORT_FILE, Writable
from reelquant.checkpoint.stored import Stored, describe
from reelquant.discover.arguments import KINDS, OWN
from reelquant.discover.components import plain
from reelquant.models.blank import CLASS, QUANTIZATION, read_json
from reelquant.models.manifest import check_manifest, write_manifest
from reelquant.nn import quantized_layers
from reelquant.nn.around.routed import routed

WEIGHTS = "denoiser.safetensors"
RECIPE = "reelquant_recipe"  # attribute of a quantized module: the recipe as a mapping, and its digest


def adopt_module(module: nn.Module, recipe: Any) -> None:
    """Remember in a module by which :class:`~reelquant.recipes.recipe.Recipe` it was quantized; for modules without a config."""
    setattr(module, RECIPE, (recipe.model_dump(mode="json", exclude_unset=True), recipe.digest()))


def save_module(own: Any, folder: str | Path, report: Writable | None = None, *, force: bool = False) -> Path:
    """Write the quantized module of a :class:`reelquant.Denoiser` as a folder; :func:`reelquant.load_denoiser` reads it.

    The folder appears complete or not at all. Apart from ``report.json`` the same module gives the same bytes.

    Args:
        own: the Denoiser.
        folder: where to; its parents are made.
        report: written as ``report.json``.
        force: replace an existing folder of this kind.

    Raises:
        CheckpointError: if the folder exists, or the disk does not take the files.
        UnsupportedError: if nothing is quantized, or weights are offloaded.
    """
    check_target(folder, force=force, index=OWN_INDEX)
    module = plain(own.denoiser)
    if not quantized_layers(module):
        raise UnsupportedError(f"{type(module).__name__} has no quantized layers; quantize it first, or save its state dict yourself")
    mapping, digest = getattr(module, RECIPE, ({}, ""))
    tensors, same = _distinct(module)
    content = {
        CLASS: type(module).__name__,
        "arguments": dict(getattr(module, OWN, {})),
        "same": same,
        "routed": routed(module),
        QUANTIZATION: describe(module, mapping, digest).to_json(),
    }
    with new_folder(folder, force=force, index=OWN_INDEX) as temporary:
        _write(temporary, tensors, content)
        if report is not None:
            report.save(temporary / REPORT_FILE)
        write_manifest(temporary)
    return absolute(folder)


def _write(folder: Path, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / OWN_INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / WEIGHTS).chmod((folder / OWN_INDEX).stat().st_mode)  # safetensors makes files that only their owner may read


def _distinct(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a module, and the names of those that are others' of it under a second name (tied weights)."""
    found: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in module.state_dict().items():
        key = (value.data_ptr(), value.shape, value.dtype, value.stride())
        if value.numel() and key in first:
            same[name] = first[key]
            continue
        first[key] = name
        found[name] = value.detach().cpu().clone().contiguous()
    return found, same


@dataclass(frozen=True)
class OwnModule:
    """What a folder of :func:`save_module` holds.

    Attributes:
        folder: where it is.
        kind: class of the module that was saved.
        arguments: what is known of the arguments of its forward beside their names.
        stored: the description of its quantized layers.
        same: names of tensors that are stored under another name.
        routed: whether its sampler calls ``module.forward`` itself.
    """

    folder: Path
    kind: str
    arguments: dict[str, Any]
    stored: Stored
    same: dict[str, str] = field(default_factory=dict)
    routed: bool = False

    @classmethod
    def open(cls, folder: str | Path) -> OwnModule:
        """Check the files against their sums, and read the description.

        Raises:
            CheckpointError: if it is not such a folder, or was changed.
        """
        path = absolute(folder)
        if not (path / OWN_INDEX).is_file():
            raise CheckpointError(
                f"'{path}' is not the folder of a module (no {OWN_INDEX}); reelquant.save(Denoiser(...), folder) writes one"
            )
        if not check_manifest(path):
            raise CheckpointError(f"'{path}' has lost the sums of its files; save the module again")
        content = read_json(path / OWN_INDEX)
        described, arguments, same = (content.get(key) for key in (QUANTIZATION, "arguments", "same"))
        texts = [one for table in (arguments, same) if isinstance(table, dict) for one in table.values()]
        if not (isinstance(described, dict) and isinstance(arguments, dict) and isinstance(same, dict)) or any(
            not isinstance(one, str) for one in texts
        ):
            raise CheckpointError(f"'{path / OWN_INDEX}' is damaged; save the module again")
        if wrong := [one for one in arguments.values() if one not in KINDS]:
            raise CheckpointError(
                f"'{path / OWN_INDEX}' calls an argument {wrong[0]!r:.40}, which this reelquant does not know: upgrade it"
            )
        return cls(path, str(content.get(CLASS)), arguments, Stored.from_json(described), same, content.get("routed") is True)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(self.folder / WEIGHTS)
            return found | {name: found[other] for name, other in self.same.items()}
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(f"'{self.folder / WEIGHTS}' is truncated or corrupt ({error}); save the module again") from None
