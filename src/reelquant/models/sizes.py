"""Folders that lie about sizes: what their configs ask for is bounded by what their files hold, before anything is allocated."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reelquant._errors import CheckpointError
from reelquant.models.blank import CONFIG, read_config

DEPTHS = ("num_layers", "num_hidden_layers", "num_single_layers", "num_blocks", "num_attention_blocks", "n_layer", "n_layers", "depth")
LARGEST = 20_000_000  # of any size in a config; vocabularies and positions are far below
TABLE = 2**20  # positions of a table that models of diffusers make when they are built
TABLES = ("seq_len", "num_positions", "num_frames", "sample_size", "sample_frames", "sample_height", "sample_width")
NO_SIZES = ("theta", "base", "_id", "_length", "_ids", "seed")  # endings of settings that may be huge
HOLE = 2**30  # bytes from which a file must be more than a hole


def check_sizes(folder: Path, files: Sequence[Path]) -> None:
    """Refuse a component's config that asks for more than its files can hold.

    Args:
        folder: of the component.
        files: its safetensors files that would be loaded; their headers are known to be whole. Nothing is checked without any.

    Raises:
        CheckpointError: naming the setting.
    """
    if not files:
        return
    stored, own = sum(map(_tensors, files)), "_class_name" in (config := read_config(folder))
    for key, value in _numbers(config):
        most = max(stored, 64) if key in DEPTHS else TABLE if own and any(word in key for word in TABLES) else LARGEST
        if value > most and not key.endswith(NO_SIZES):
            raise CheckpointError(
                f"'{folder / CONFIG}' says {key} = {value:.4g}, and its files hold {stored} tensors: no model of that size is in them; "
                "download or save it again"
            )


def _numbers(config: Any, key: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(config, Mapping):
        for name, value in config.items():
            if name != "quantization_config":
                yield from _numbers(value, str(name))
    elif isinstance(config, list):
        for value in config[:1000]:
            yield from _numbers(value, key)
    elif isinstance(config, int) and not isinstance(config, bool):
        yield key, config


def _tensors(file: Path) -> int:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return len(json.loads(opened.read(length)))


def check_hole(file: Path) -> None:
    """Refuse a large file that is hardly there: reading it costs what its size says.

    Raises:
        CheckpointError: naming it.
    """
    state = file.stat()
    blocks = getattr(state, "st_blocks", None)
    if blocks is not None and state.st_size > HOLE and blocks * 512 < state.st_size / 100:
        raise CheckpointError(f"'{file}' has {state.st_size} bytes, and the disk holds {blocks * 512} of them; download or save it again")
