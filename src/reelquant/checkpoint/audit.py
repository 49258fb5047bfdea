"""Compare a whole folder with the sums that were stored when it was written, without loading it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reelquant._errors import CheckpointError
from reelquant._sums import OWN, json_sum
from reelquant.checkpoint.export.source import ExportSource, component_folders
from reelquant.checkpoint.folder import OWN_INDEX, absolute
from reelquant.checkpoint.own_module import OwnModule
from reelquant.checkpoint.stored import METHOD
from reelquant.models.blank import CLASS, QUANTIZATION, read_config, read_json
from reelquant.models.manifest import REPORT, check_manifest, summed, write_manifest
from reelquant.models.pipelines import check_folder, locate


@dataclass(frozen=True)
class Verified:
    """What was compared and found good.

    Attributes:
        folder: of the pipeline.
        files, bytes: that have sums and were read; 0 for folders of other programs and of older versions.
        layers: quantized layers of denoisers, each compared with its own sums.
        renewed: sums of the files were taken from the files as they are.
    """

    folder: Path
    files: int
    bytes: int
    layers: int
    renewed: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"folder": str(self.folder)}


def verify_folder(folder: str | Path, *, renew: bool = False) -> Verified:
    """Compare every file of a pipeline's folder with its sum, and every quantized layer with its own.

    Args:
        folder: of a pipeline, or of a module without one.
        renew: first take the files as they are: for folders that were changed on purpose, or that have no sums yet.

    Raises:
        CheckpointError: naming the first file or layer that is not what was written.
    """
    if (own := absolute(folder) / OWN_INDEX).is_file():
        return _verify_module(own.parent, renew=renew)
    root = absolute(locate(folder))
    if not root.is_dir():
        raise CheckpointError(f"'{folder}' is not a folder here; verify reads files on this machine")
    check_folder(root, verify=False)
    if not renew:
        check_manifest(root)
        _check_report(root / REPORT)
    layers = sum(_layers(part) for part in component_folders(root))
    if renew:
        _renew(root)
    files, size = summed(root)
    return Verified(root, files, size, layers, renew)


def _verify_module(root: Path, *, renew: bool) -> Verified:
    """The same for the folder of a module without a pipeline; its files' sums cover every layer."""
    if renew:
        _renew(root)
    else:
        _check_report(root / REPORT)
    layers = len(OwnModule.open(root).stored.layers)
    return Verified(root, *summed(root), layers, renew)


def _renew(root: Path) -> None:
    try:
        write_manifest(root)
    except OSError as error:
        raise CheckpointError(f"cannot write the sums of '{root}': {error}") from error


def _layers(component: Path) -> int:
    """Read the quantized layers of a model of diffusers."""
    config = read_config(component)
    described = config.get(QUANTIZATION)
    if CLASS not in config or not isinstance(described, dict) or described.get("quant_method") != METHOD:
        return 0
    with ExportSource(component) as source:
        for name, layout in source.stored.layers.items():
            (source.checked if layout.folded else source.layer)(name)
        return len(source.stored.layers)


def _check_report(file: Path) -> None:
    if not file.is_file():
        return
    content = read_json(file)
    if OWN in content and content[OWN] != json_sum(content):
        raise CheckpointError(f"'{file}' is not what was written: its SHA-256 sum differs; delete it, or quantize again to get a new one")
