"""The folder that a streamed run writes: config and shards of quantized components, copies of everything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from reelquant._sums import Sealed
from reelquant.checkpoint import REPORT_FILE, Spec, Workspace, describe, forget_paths, write_tensors
from reelquant.engine.session import Session
from reelquant.models.manifest import MANIFEST
from reelquant.models.pipelines import mark_quantized
from reelquant.models.weight_files import plain_name
from reelquant.nn import stop_clock
from reelquant.streaming.job import Job
from reelquant.streaming.pieces import read_about

SHARD = 10_000_000_000  # bytes; what diffusers writes by default


def sealed(work: Workspace) -> Sealed:
    """The result, whose list of sums lies beside it: a run that goes on keeps files of the one before only if they are intact."""
    return Sealed(work.result, work.folder / "work" / "written.txt")


def write_component(session: Session, work: Workspace) -> None:
    """config.json and the shards of a component, as diffusers would have written them."""
    from huggingface_hub import split_torch_state_dict_into_shards

    model, recipe, disk = session.denoiser, session.plan.recipe, session.store.disk
    known = {name: read_about(disk.pieces[name].files[0]) for name in session.floats}
    checksums, sums = ({name: about[key] for name, about in known.items()} for key in ("checksum", "sum"))
    stored = describe(model, recipe.model_dump(mode="json", exclude_unset=True), recipe.digest(), checksums, sums)
    stop_clock(model)
    mark_quantized(model, stored.to_json())
    folder, result = work.result / session.component, sealed(work)
    folder.mkdir(exist_ok=True)
    model.save_config(folder)
    forget_paths(folder)
    values = model.state_dict()
    split = split_torch_state_dict_into_shards(values, filename_pattern=PATTERN, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        if not result.good(f"{session.component}/{file}"):
            specs = {name: Spec(values[name].dtype, tuple(values[name].shape)) for name in names}
            result.write(f"{session.component}/{file}", lambda path, specs=specs: write_tensors(path, specs, disk.load))
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
        if Path(name).parts[0] in job.plans or name in (REPORT_FILE, MANIFEST):
            continue
        plain = Path(name).with_name(plain_name(file)).as_posix()
        if not sealed(work).good(plain):
            sealed(work).write(plain, lambda place, file=file: shutil.copyfile(file, place))
