"""The folder that a streamed run writes: config and shards of quantized components, copies of everything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from reelquant.checkpoint import REPORT_FILE, Spec, Workspace, describe, forget_paths, whole_file, write_tensors
from reelquant.engine.session import Session
from reelquant.models.pipelines import mark_quantized
from reelquant.models.weight_files import plain_name
from reelquant.nn import stop_clock
from reelquant.streaming.job import Job
from reelquant.streaming.pieces import read_about

SHARD = 10_000_000_000  # bytes; what diffusers writes by default


def write_component(session: Session, folder: Path) -> None:
    """config.json and the shards of a component, as diffusers would have written them."""
    from huggingface_hub import split_torch_state_dict_into_shards

    model, recipe, disk = session.denoiser, session.plan.recipe, session.store.disk
    sums = {name: read_about(disk.pieces[name].files[0])["checksum"] for name in session.floats}
    stored = describe(model, recipe.model_dump(mode="json", exclude_unset=True), recipe.digest(), sums)
    stop_clock(model)
    mark_quantized(model, stored.to_json())
    folder.mkdir(exist_ok=True)
    model.save_config(folder)
    forget_paths(folder)
    values = model.state_dict()
    split = split_torch_state_dict_into_shards(values, filename_pattern=PATTERN, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        if not (folder / file).is_file():
            specs = {name: Spec(values[name].dtype, tuple(values[name].shape)) for name in names}
            whole_file(folder / file, lambda path, specs=specs: write_tensors(path, specs, disk.load))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
INDEX_FILE = "diffusion_pytorch_model.safetensors.index.json"


def copy_others(job: Job, work: Workspace) -> None:
    """Everything that is not quantized, byte for byte, a variant of weights under their plain name.

    Copies, not links: a link would let a later save write into the source.
    """
    for name, file in job.source.files().items():
        if Path(name).parts[0] in job.plans or name == REPORT_FILE:
            continue
        target = work.result / Path(name).with_name(plain_name(file))
        if not target.is_file():
            whole_file(target, lambda place, file=file: shutil.copyfile(file, place))
