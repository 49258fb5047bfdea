"""Checkpoints: what ``config.json`` says about a quantized denoiser, checksums, and whole pipelines written in one piece."""

from reelquant.checkpoint.folder import check_target, new_folder
from reelquant.checkpoint.save import save
from reelquant.checkpoint.stored import FORMAT_VERSION, METHOD, Slots, Stored, adopt, describe
from reelquant.checkpoint.verify import tile_checksum, verify

__all__ = [
    "FORMAT_VERSION",
    "METHOD",
    "Slots",
    "Stored",
    "adopt",
    "check_target",
    "describe",
    "new_folder",
    "save",
    "tile_checksum",
    "verify",
]
