"""Which files of a pipeline's folder are its weights: what diffusers and transformers would load, and nothing that lies beside it.

A folder may hold its weights in a variant only (``diffusion_pytorch_model.fp16.safetensors``): downloads that were told to take the small
one. The libraries want to be told, so it is found here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from reelquant._errors import CheckpointError
from reelquant.models.blank import read_json

STEMS = ("diffusion_pytorch_model", "model")  # what diffusers and transformers call their weights
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
INDEX = "model_index.json"
_VARIANT = re.compile(rf"(?:{'|'.join(STEMS)})(?:\.safetensors\.index\.(?P<index>[^.]+)\.json|\.(?P<single>[^.]+)\.safetensors)")
_SHARD = re.compile(r".*-\d+-of-\d+")


def component_folders(folder: Path) -> list[Path]:
    """The folders of a pipeline's components, as far as they exist."""
    file = folder / INDEX
    parts = read_json(file) if file.is_file() else {}
    return [folder / name for name, part in parts.items() if isinstance(part, list) and (folder / name).is_dir()]


def main_file(component: Path, variant: str | None = None) -> Path | None:
    """The weights of a component, or the index of their shards; None if it has no safetensors. A variant that is named goes first.

    Raises:
        CheckpointError: if they are stored in several variants only.
    """
    chosen = [file for file in sorted(component.iterdir()) if variant is not None and _variant_of(file.name) == variant]
    if found := next(iter(chosen), None) or _plain(component):
        return found
    names = variants(component)
    if len(names) > 1:
        raise CheckpointError(_several(component, names))
    return next((file for file in sorted(component.iterdir()) if _variant_of(file.name) in names), None) if names else None


def loaded_files(component: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files that a library would load for a component; without those of its index that are missing.

    Raises:
        CheckpointError: if its index is broken, or there are several variants and nothing else.
    """
    file = main_file(component, variant)
    if file is None or file.suffix != ".json":
        return [] if file is None else [file]
    homes = read_json(file).get("weight_map")
    names = homes.values() if isinstance(homes, dict) else ()
    return [component / name for name in sorted({str(name) for name in names}) if (component / name).is_file()]


def variants(component: Path) -> list[str]:
    """Names of the variants in which a component is stored; none if it is also stored as libraries look for it by themselves."""
    if _plain(component):
        return []
    return sorted({name for file in component.iterdir() if (name := _variant_of(file.name)) is not None})


def stored_variants(component: Path) -> list[str | None]:
    """Every variant in which a component is stored as safetensors; None is the one without a name."""
    named = {variant for file in component.iterdir() if (variant := _variant_of(file.name)) is not None}
    return [*([None] if _plain(component) else []), *sorted(named)]


def weight_bytes(homes: Iterable[Path], variant: str | None = None) -> int:
    """Bytes of the tensors that would be loaded from the folders of some components, without headers, so that shards make no difference.

    A component that is not stored in the variant counts as a library finds it.
    """
    found = 0
    for home in homes:
        kinds = stored_variants(home)
        if kinds:
            chosen = variant if variant in kinds else kinds[0]
            found += sum(map(_tensor_bytes, loaded_files(home, chosen)))
    return found


def _tensor_bytes(file: Path) -> int:
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def sole_variant(folder: Path) -> str | None:
    """The variant that has to be named to open a pipeline, or None.

    Raises:
        CheckpointError: if its components have no variant in common, or several.
    """
    found = {component: set(variants(component)) for component in component_folders(folder)}
    stored = [names for names in found.values() if names]
    if not stored:
        return None
    common = sorted(set.intersection(*stored))
    if len(common) != 1:
        component = next(part for part, names in found.items() if names)
        raise CheckpointError(_several(component, sorted(set.union(*stored))))
    return common[0]


def plain_name(file: Path) -> str:
    """The name under which a library finds a file of a variant by itself, if no other file has it; other names as they are."""
    variant = _variant_of(file.name)
    plain = file.name if variant is None else file.name.replace(f".{variant}.", ".", 1)
    return file.name if file.with_name(plain).exists() else plain


def _plain(component: Path) -> Path | None:
    files = (component / f"{stem}.safetensors{end}" for stem in STEMS for end in (".index.json", ""))
    return next((file for file in files if file.is_file()), None)


def _variant_of(name: str) -> str | None:
    found = _VARIANT.fullmatch(name)
    variant = found and (found["index"] or found["single"])
    return None if variant is None or _SHARD.fullmatch(variant) else variant


def _several(component: Path, names: list[str]) -> str:
    return (
        f"'{component}' holds its weights in the variants {', '.join(map(repr, names))} only, and one has to be chosen: "
        f"reelquant.open_pipeline(folder, variant='{names[0]}') (--variant {names[0]} of the command), or delete the others"
    )
