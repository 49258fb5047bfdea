"""Quantize a pipeline's folder without ever holding the float model: tensors come from its shards and go to new ones.

The engine is the one that works in memory; only where things are differs. The denoiser is :class:`~reelquant.recipes.offload.OnDisk`,
statistics are in a :class:`~reelquant.recipes.journal.Journal`, every quantized layer is a file of its own until all are there. All three
remember what has been done, so a run that was stopped goes on by running again.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant._progress import Progress, Silent
from reelquant._version import __version__
from reelquant.checkpoint import (
    INDEX,
    REPORT_FILE,
    Shards,
    Spec,
    Workspace,
    describe,
    forget_paths,
    tile_checksum,
    whole_file,
    workspace,
    write_tensors,
)
from reelquant.discover import denoisers_of, discover, stand_in
from reelquant.models.lora import LoraFiles, adapter_file, short_names
from reelquant.models.pipelines import check_folder, mark_quantized
from reelquant.nn import KernelFacts, LayerLayout, QuantLayer, get_module, layer_facts, quantized_class, stop_clock
from reelquant.recipes.build import BuiltGroup, GroupWork, LayerRecord, Options, build_layer, folded, prepare_group
from reelquant.recipes.calibration import Calibration
from reelquant.recipes.components import default_texts, plan_components
from reelquant.recipes.engine import Session, run
from reelquant.recipes.estimate import Estimate, check_room, estimate
from reelquant.recipes.journal import Journal, digest
from reelquant.recipes.offload import OnDisk, hollow, keep
from reelquant.recipes.plan import Plan
from reelquant.recipes.recipe import Recipe
from reelquant.recipes.report import Report, total
from reelquant.recipes.search import Assignment
from reelquant.sites import Group
from reelquant.transforms import Rewrite

SHARD = 10_000_000_000  # bytes; what diffusers writes by default
LARGE = 4  # a text encoder beyond this part of the budget stays on disk, too
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")


@dataclass(frozen=True, eq=False)
class Source:
    """A float pipeline's folder, opened as far as its headers.

    Attributes:
        folder: the folder.
        dtype: of the float parts.
        device: where layers are built and the sampler runs.
        disks: every denoiser, by component name, in the order in which the sampler uses them.
    """

    folder: Path
    dtype: torch.dtype
    device: str
    disks: dict[str, OnDisk]

    @classmethod
    def open(cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Source:
        """Read configs and headers.

        Raises:
            CheckpointError: if files are missing, broken or pickled.
            UnsupportedError: if the pipeline has no denoiser, or is quantized.
        """
        path = Path(folder)
        check_folder(path)
        index = json.loads((path / INDEX).read_text())
        known = {
            name: part for name, part in index.items() if isinstance(part, list) and part[0] == "diffusers" and _has_weights(path / name)
        }
        models = {name: hollow(path, name, dtype) for name in known}
        found = denoisers_of(SimpleNamespace(components=models))
        for name in found:
            if "quantization_config" in json.loads((path / name / "config.json").read_text()):
                raise UnsupportedError(f"'{path / name}' is quantized; give the folder of the float pipeline")
        return cls(path, dtype, device, {name: OnDisk(model, Shards.of(path / name), device) for name, model in found.items()})

    @property
    def pipe(self) -> Any:
        """Something with the name of the pipeline's class and its denoisers."""
        kind = type(json.loads((self.folder / INDEX).read_text())["_class_name"], (SimpleNamespace,), {})
        return kind(components={name: disk.model for name, disk in self.disks.items()})

    def check_denoisers(self, names: Iterable[str]) -> None:
        """Refuse components that only a pipeline in memory quantizes.

        Raises:
            UnsupportedError: naming the first.
        """
        for name in names:
            if name in _modules(self.folder) and name not in self.disks:
                raise UnsupportedError(
                    f"'{name}' is no denoiser of '{self.folder}', and only denoisers ({', '.join(self.disks)}) are quantized from disk to "
                    "disk; leave it out, or quantize in memory (reelquant.quantize; no --max-memory, no --resume)"
                )

    def files(self) -> dict[str, list[int]]:
        """Size and time of change of every file, by its path in the folder."""
        found = (file for file in sorted(self.folder.rglob("*")) if file.is_file())
        return {str(file.relative_to(self.folder)): _stamp(file) for file in found}


def _stamp(file: Path) -> list[int]:
    return [file.stat().st_size, file.stat().st_mtime_ns]


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be done: everything that decides the result.

    Attributes:
        source: the float pipeline.
        plans: what happens to each component, by its name.
        prompts: calibration texts; None for the pipeline's own.
        call: arguments of the pipeline call during calibration.
        budget: bytes of memory that may be used.
        adapters: file -> scale of what is merged into the float weights first; see :mod:`reelquant.models.lora`.
    """

    source: Source
    plans: Mapping[str, Plan]
    prompts: Sequence[str] | None
    call: Mapping[str, Any]
    budget: int
    adapters: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, source: Source, recipes: Mapping[str, Recipe], prompts: Sequence[str] | None, skip: Sequence[str], call: Mapping[str, Any],
        budget: int, adapters: Mapping[str, float] | None = None,
    ) -> Job:  # fmt: skip
        """Plan every component; their parameters stay on the meta device.

        Raises:
            UnsupportedError: for a component that is no denoiser of the pipeline.
        """
        source.check_denoisers(recipes)
        plans = plan_components(source.pipe, recipes, skip, lambda name, part: discover(stand_in(part)))
        return cls(source, plans, prompts, call, budget, adapters or {})

    def check(self) -> None:
        """Refuse what needs the model in memory.

        Raises:
            UnsupportedError: for a recipe with tables of temporal outputs.
        """
        for plan in self.plans.values():
            if plan.recipe.temporal == "table":
                raise UnsupportedError(
                    f"recipe '{plan.recipe.name}' stores tables of temporal outputs, which needs the model in memory; set "
                    "temporal=quantize, or allow more memory"
                )

    @property
    def calibrates(self) -> bool:
        return any(not plan.recipe.data_free for plan in self.plans.values())

    def identity(self) -> dict[str, Any]:
        """What must be the same for an interrupted run to go on."""
        kept = {name: sorted(row.layer.name for row in plan.kept) for name, plan in self.plans.items()}
        return {
            "reelquant": __version__,
            "torch": torch.__version__,
            "recipe": {name: plan.recipe.digest() for name, plan in self.plans.items()},
            "layers": digest(kept),
            "dtype": str(self.source.dtype),
            "device": self.source.device,
            "prompts": digest(self.prompts),
            "call": digest(dict(self.call)),
            "adapters": {source: [scale, *_stamp(adapter_file(source)[1])] for source, scale in self.adapters.items()},
            "source": self.source.files(),
        }

    def estimate(self) -> Estimate:
        """Time, memory and disk before anything is done."""
        return estimate(self.source.folder, self.source.disks, self.plans, self.call)

    def seconds(self, expected: Estimate) -> float:
        """About how long it takes: one layer is loaded and rounded, its times count for all. Samplers and solvers come on top."""
        name, plan = next(iter(self.plans.items()))
        disk, row = self.source.disks[name], max(plan.quantized, key=lambda row: math.prod(row.layer.shape))
        start = time.perf_counter()
        module = disk.layer(row.layer.name)
        loaded = time.perf_counter()
        build_layer(plan, GroupWork([row], Rewrite(), False), replace(row, input=None), module, {}, {}, [], draft=True)
        built = time.perf_counter()
        weights = sum(math.prod(row.layer.shape) for plan in self.plans.values() for row in plan.quantized)
        size = sum(value.numel() * value.element_size() for value in module.parameters())
        return expected.moved * (loaded - start) / size + weights * (built - loaded) / math.prod(row.layer.shape)


def quantize_folder(job: Job, output: str | Path, *, resume: bool = False, force: bool = False, progress: Progress | None = None) -> Report:
    """Do it: the folder appears complete or not at all, and what is done is kept for ``resume``.

    Returns:
        The report, as it is written to ``report.json``.

    Raises:
        CheckpointError: no room, a folder that may not be written, another process at work, an interrupted run about something else.
        CalibrationError: weights or inputs that are not finite.
        UnsupportedError: for what needs the model in memory.
    """
    job.check()
    expected = job.estimate()
    expected.check_memory(job.budget)
    with workspace(output, job.identity(), resume=resume, force=force) as work:
        check_room(work, expected)
        pipe = _pipeline(job, work) if job.calibrates or job.adapters else None
        report = _components(job, work, pipe, progress or Silent())
        _copy_others(job, work)
        report.save(work.result / REPORT_FILE)
        return report


def _components(job: Job, work: Workspace, pipe: Any, progress: Progress) -> Report:
    """Quantize every component and write its folder."""
    place, sessions = work.folder / "work", list[Streamed]()
    recipes = {name: plan.recipe for name, plan in job.plans.items()}
    texts = job.prompts or (default_texts(pipe, recipes) if job.calibrates else [])
    for name, plan in job.plans.items():
        journal, model = Journal(place / name / "journal"), job.source.disks[name].model
        sessions.append(Streamed(pipe, name, model, plan.recipe, progress, journal=journal, job=job, folder=place / name, peers=sessions))
        sessions[-1].plan = plan
    with _merging(job, pipe):
        try:
            for session in sessions:
                session.check_weights()
                if job.calibrates:
                    session.begin(texts, dict(job.call))
            reports = run(sessions, {})
            for session in sessions:
                with session.timed("write", 1):
                    _write(session, work.result / session.component)
        finally:
            for session in reversed(sessions):
                stop_clock(session.denoiser)
                session.restore()
    report = total(reports)
    report.adapters = short_names(job.adapters)
    return report


@contextmanager
def _merging(job: Job, pipe: Any) -> Iterator[None]:
    """Inside, adapters are merged into each tensor when it is read.

    Raises:
        UnsupportedError: if one changes a component that is copied as it is.
    """
    files = LoraFiles(pipe, job.adapters) if job.adapters else None
    for name in files.components if files else ():
        if name not in job.plans:
            raise UnsupportedError(
                f"the adapters change '{name}', which is copied as it is when a pipeline is quantized from disk to disk; "
                + (f"quantize '{name}', too, or " if name in job.source.disks else "")
                + "quantize in memory (reelquant.quantize; no --max-memory, no --resume)"
            )
    try:
        for name in files.components if files else ():
            job.source.disks[name].change = functools.partial(files.merged, name)
        yield
    finally:
        for disk in job.source.disks.values():
            disk.change = keep


def _pipeline(job: Job, work: Workspace) -> Any:
    """The stock pipeline around denoisers, and large text encoders, that stay on disk."""
    import diffusers

    source = job.source
    # Not DiffusionPipeline: it takes no note of components given to it that are optional for the real class, and loads them itself.
    kind = getattr(diffusers, json.loads((source.folder / INDEX).read_text())["_class_name"], diffusers.DiffusionPipeline)
    parts = {name: disk.model for name, disk in source.disks.items()}
    for name, (library, cls) in _modules(source.folder).items():
        size = sum(file.stat().st_size for file in (source.folder / name).glob("*.safetensors"))
        if library == "transformers" and size > job.budget / LARGE:
            parts[name] = _text_encoder(source, name, cls, work.folder / "work" / "offload")
    pipe = kind.from_pretrained(source.folder, dtype=source.dtype, use_safetensors=True, **parts)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in parts:
            part.to(source.device)
    here = property(lambda self: torch.device(source.device))  # else the pipeline reads it off parameters, which are on the meta device
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {"device": here, "_execution_device": here})
    return pipe


def _modules(folder: Path) -> dict[str, tuple[str, str]]:
    index = json.loads((folder / INDEX).read_text())
    return {name: (part[0], part[1]) for name, part in index.items() if isinstance(part, list) and part[0] and _has_weights(folder / name)}


def _text_encoder(source: Source, name: str, cls: str, offload: Path) -> nn.Module:
    """transformers and accelerate know how to leave theirs in the files."""
    import transformers

    offload.mkdir(parents=True, exist_ok=True)
    kind = getattr(transformers, cls)
    return kind.from_pretrained(source.folder / name, dtype=source.dtype, device_map={"": "disk"}, offload_folder=str(offload))


@dataclass(eq=False)
class StoredGroup(BuiltGroup):
    """A group whose tensors are in files; ``pieces`` holds them by module name."""

    pieces: dict[str, Shards] = field(default_factory=dict)


@dataclass(eq=False)
class Streamed(Session):
    """A quantization whose tensors are on disk.

    Attributes:
        job: the work.
        folder: where the pieces of this component go.
        peers: the sessions of all components, this one among them.
        journal: what was sampled.
    """

    job: Job = field(kw_only=True)
    folder: Path = field(kw_only=True)
    peers: list[Streamed] = field(kw_only=True)
    journal: Journal = field(kw_only=True)

    @property
    def disk(self) -> OnDisk:
        return self.job.source.disks[self.component]

    def check_weights(self) -> None:
        """Refuse float layers that are not finite; those that are quantized are checked when they are built."""
        for row in self.plan.kept:
            self.disk.layer(row.layer.name)

    @contextmanager
    def sampling(self, phase: str) -> Iterator[None]:
        """Inside, the pipeline runs."""
        with ExitStack() as stack:
            for name, disk in self.job.source.disks.items():
                stack.enter_context(disk.running(disk.present(self.job.plans.get(name, self.plan).map.blocks)))
            for peer in self.peers:
                stack.enter_context(peer.journal.remembering(peer.denoiser, phase))
            yield

    def observe(self, together: Sequence[Session]) -> list[Calibration]:
        """Sample once, block by block, and keep the statistics on disk."""
        with self.sampling(f"calibrate-{self.component}"):
            found = super().observe(together)
        for peer in self.peers:
            peer.journal.forget_generator()
        return found

    def held_out_latents(self, **overrides: Any) -> Tensor:
        """Final latents of the held-out clips, sampled block by block."""
        steps = (self.arguments | overrides).get("num_inference_steps")
        pieces = {
            f"{peer.component}.{name}": str(shards.files[0].relative_to(peer.folder))
            for peer in self.peers
            for name, shards in peer.disk.pieces.items()
        }
        protected = [(clock.protected_slots, clock.inputs) for peer in self.peers for clock in peer.clock]
        with self.sampling(f"sampled-{self.component}-{digest(steps, pieces, protected)}"):
            return super().held_out_latents(**overrides)

    def trial(self, assignment: Assignment, reference: Tensor) -> float:
        """A candidate's score; remembered, so that its layers need not be kept."""
        record = self.folder / "trials" / f"{digest({name: list(options.items()) for name, options in assignment.items()})}.json"
        if not record.is_file():
            score = super().trial(assignment, reference)
            whole_file(record, lambda path: path.write_text(json.dumps(score)))
            if self.plan.recipe.search.scope == "model":
                shutil.rmtree(self.folder / "draft", ignore_errors=True)
                self.drafts.clear()
        return json.loads(record.read_text())

    def build(self, group: Group, options: Options, *, draft: bool = False) -> StoredGroup:
        """Make those layers of a group that are not on disk yet, one after the other."""
        steps = sorted({number for name in group.layers for number in self.plan.layers[name].steps})
        place = self.folder / ("draft" if draft else "final") / digest([(number, options.get(number)) for number in steps])
        rows = [self.plan.layers[name] for name in group.layers if self.plan.layers[name].kept is None]
        files = {row.layer.name: place / f"{row.layer.name}.safetensors" for row in rows}
        norm = place / f"{group.producer}.safetensors"
        if missing := [row for row in rows if not files[row.layer.name].is_file()]:
            inputs = self.calibration.inputs if self.calibration else {}
            shared = prepare_group(self.plan, group, self.denoiser, self.disk.layer, inputs, options)
            if shared.fold is not None and group.producer is not None:
                affine = dict(self.disk.layer(group.producer).named_parameters(recurse=False))
                _store(norm, folded(affine, shared.fold), {})
            for row in missing:
                name = row.layer.name
                module = self.disk.layer(name)
                layer, record = build_layer(self.plan, shared, row, module, inputs, options, self.timesteps, draft=draft)
                _store(files[name], layer.state_dict(), _about(layer, record))
                del module, layer
        pieces = {name: Shards([file]) for name, file in files.items()}
        about = {name: _read_about(file) for name, file in files.items()}
        layers = {name: _empty_layer(self.floats.get(name) or get_module(self.denoiser, name), about[name], pieces[name]) for name in files}
        records = [] if draft else [LayerRecord(**about[name]["record"]) for name in files]
        folds = {group.producer: Shards([norm])} if group.producer is not None and norm.is_file() else {}
        return StoredGroup(group, layers, None, records, pieces | folds)

    def install(self, assignment: Assignment, make: Callable[[Group, Options], BuiltGroup]) -> list[BuiltGroup]:
        """Swap layers on the meta device in, and tell the disk where their tensors are."""
        chosen = super().install(assignment, make)
        for built in chosen:
            assert isinstance(built, StoredGroup)
            self.disk.pieces |= built.pieces
        return chosen

    def restore(self) -> None:
        """Back to the float files."""
        super().restore()
        self.disk.pieces.clear()

    def kernels(self) -> KernelFacts:
        """What would compute the layers, as each said when it was built."""
        said = [
            _read_about(self.disk.pieces[name].files[0]) for name, part in self.denoiser.named_modules() if isinstance(part, QuantLayer)
        ]
        return KernelFacts.of(one["facts"] for one in said)


def _about(layer: QuantLayer, record: LayerRecord | None) -> dict[str, Any]:
    facts = layer_facts(layer)
    return {"layout": layer.layout.to_json(), "checksum": tile_checksum(layer), "record": record and asdict(record), "facts": facts}


def _store(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    whole_file(file, lambda path: save_file(whole, path, {"about": json.dumps(about)}))


def _read_about(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["about"])


def _empty_layer(module: nn.Module, about: Mapping[str, Any], piece: Shards) -> QuantLayer:
    """A quantized layer on the meta device, of the very dtypes that are in the file."""
    layer = quantized_class(module).like(module, LayerLayout.from_json(about["layout"]), device="meta")
    for name, spec in piece.specs.items():
        empty = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        setattr(layer, name, nn.Parameter(empty, requires_grad=False) if name in layer._parameters else empty)
    return layer


def _write(session: Streamed, folder: Path) -> None:
    """config.json and the shards of a component, as diffusers would have written them."""
    from huggingface_hub import split_torch_state_dict_into_shards

    model, recipe = session.denoiser, session.plan.recipe
    sums = {name: _read_about(session.disk.pieces[name].files[0])["checksum"] for name in session.floats}
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
            whole_file(folder / file, lambda path, specs=specs: write_tensors(path, specs, session.disk.load))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
INDEX_FILE = "diffusion_pytorch_model.safetensors.index.json"


def _copy_others(job: Job, work: Workspace) -> None:
    """Everything that is not quantized, byte for byte. Copies, not links: a link would let a later save write into the source."""
    source = job.source.folder
    for file in sorted(source.rglob("*")):
        path = file.relative_to(source)
        outside = len(path.parts) == 1 and path.suffix in WEIGHTS  # the whole model once more, for other programs
        hidden = any(part.startswith(".") for part in path.parts)
        if not file.is_file() or outside or hidden or path.parts[0] in job.plans or path.name == REPORT_FILE:
            continue
        target = work.result / path
        if not target.is_file():
            whole_file(target, lambda place, file=file: shutil.copyfile(file, place))
