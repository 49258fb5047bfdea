"""Checkpoints: what ``config.json`` says about a quantized denoiser, checksums, and whole pipelines written in one piece. How codes are
computed does not belong here."""

from reelquant.checkpoint.card import write_card
from reelquant.checkpoint.folder import INDEX, absolute, check_folder, check_target, check_writable, keeping_work, new_folder, refuse_source
from reelquant.checkpoint.own_module import OwnModule, adopt_module, save_module
from reelquant.checkpoint.save import REPORT_FILE, forget_paths, save
from reelquant.checkpoint.shards import Shards, Spec, write_tensors
from reelquant.checkpoint.stored import FORMAT_VERSION, METHOD, Slots, Stored, adopt, describe
from reelquant.checkpoint.verify import layer_sum, tile_checksum, verify
from reelquant.checkpoint.workspace import Workspace, whole_file, work_folder, workspace

__all__ = [
    "FORMAT_VERSION",
    "INDEX",
    "METHOD",
    "REPORT_FILE",
    "OwnModule",
    "Shards",
    "Slots",
    "Spec",
    "Stored",
    "Workspace",
    "absolute",
    "adopt",
    "adopt_module",
    "check_folder",
    "check_target",
    "check_writable",
    "describe",
    "forget_paths",
    "keeping_work",
    "layer_sum",
    "new_folder",
    "refuse_source",
    "save",
    "save_module",
    "tile_checksum",
    "verify",
    "whole_file",
    "work_folder",
    "workspace",
    "write_card",
    "write_tensors",
]
