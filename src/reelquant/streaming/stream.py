"""Quantize a pipeline's folder without ever holding the float model: tensors come from its shards and go to new ones.

The engine is the one that works in memory; only where things are differs. The denoiser is :class:`~reelquant.streaming.offload.OnDisk`,
statistics are in a :class:`~reelquant.streaming.journal.Journal`, every quantized layer is a file of its own until all are there. All three
remember what has been done, so a run that was stopped goes on by running again.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reelquant._errors import CheckpointError, ReelQuantError, UnsupportedError
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
from reelquant.engine.build import BuiltGroup, GroupWork, LayerRecord, Options, build_layer, folded, prepare_group
from reelquant.engine.calibration import Calibration
from reelquant.engine.components import default_texts, plan_components
from reelquant.engine.plan import Plan
from reelquant.engine.report import Report, total
from reelquant.engine.run import Session, float_attention, run
from reelquant.engine.search import Assignment
from reelquant.models.blank import CLASS, QUANTIZATION, read_config, read_json
from reelquant.models.lora import LoraFiles, adapter_file, short_names
from reelquant.models.pipelines import cannot_open, check_folder, files_in, mark_quantized
from reelquant.nn import (
    AttentionFacts,
    KernelFacts,
    LayerLayout,
    QuantLayer,
    attention_facts,
    get_module,
    layer_facts,
    quantized_class,
    stop_clock,
)
from reelquant.recipes.recipe import Recipe
from reelquant.sites import Group
from reelquant.streaming.estimate import Estimate, check_room, estimate
from reelquant.streaming.journal import Journal, digest
from reelquant.streaming.offload import OnDisk, hollow, keep
from reelquant.transforms import Rewrite

SHARD = 10_000_000_000  # bytes; what diffusers writes by default
LARGE = 4  # a text encoder beyond this part of the budget stays on disk, too
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")
WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True, eq=False)
class Source:
    """A float pipeline's folder, opened as far as its headers.

    Attributes:
        folder: the folder.
        index: what its ``model_index.json`` says.
        dtype: of the float parts.
        device: where layers are built and the sampler runs.
        disks: every denoiser, by component name, in the order in which the sampler uses them.
    """

    folder: Path
    index: Mapping[str, Any]
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
        source = cls(path, read_json(path / INDEX), dtype, device, {})
        source.check_complete()
        models = {name: hollow(path / name, dtype) for name, (library, _) in source.modules.items() if library == "diffusers"}
        found = denoisers_of(SimpleNamespace(components=models))
        for name in found:
            if QUANTIZATION in read_config(path / name):
                raise UnsupportedError(f"'{path / name}' is quantized; give the folder of the float pipeline")
        return replace(source, disks={name: OnDisk(model, Shards.of(path / name), device) for name, model in found.items()})

    @property
    def components(self) -> dict[str, tuple[str, str]]:
        """Library and class of everything the pipeline is made of, by name."""
        pairs = {name: part for name, part in self.index.items() if isinstance(part, list) and len(part) == 2}
        return {name: (part[0], part[1]) for name, part in pairs.items() if all(isinstance(word, str) for word in part)}

    @property
    def modules(self) -> dict[str, tuple[str, str]]:
        """The components that have weights."""
        return {name: part for name, part in self.components.items() if any((self.folder / name).glob("*.safetensors"))}

    def check_complete(self) -> None:
        """Refuse a folder that lacks a component, the weights of one, or a shard of them: a download that was interrupted.

        Raises:
            CheckpointError: naming the first.
        """
        for name, (library, kind) in self.components.items():
            if not (self.folder / name).is_dir():
                raise CheckpointError(f"'{self.folder}' lacks its component '{name}' ({library}.{kind}); download or save it again")
            if name in self.modules or _describes_model(self.folder / name, library, kind):
                Shards.of(self.folder / name)
        for file in self.files().values():
            if not file.is_file():
                raise CheckpointError(f"'{file}' is a link to nothing; download or save it again")

    @property
    def pipe(self) -> Any:
        """Something with the name of the pipeline's class and its denoisers."""
        kind = type(str(self.index.get(CLASS)), (SimpleNamespace,), {})
        return kind(components={name: disk.model for name, disk in self.disks.items()})

    def check_denoisers(self, names: Iterable[str]) -> None:
        """Refuse components that only a pipeline in memory quantizes.

        Raises:
            UnsupportedError: naming the first.
        """
        for name in names:
            if name in self.modules and name not in self.disks:
                raise UnsupportedError(
                    f"'{name}' is no denoiser of '{self.folder}', and only denoisers ({', '.join(self.disks)}) are quantized from disk to "
                    "disk; leave it out, or quantize in memory (reelquant.quantize; no --max-memory, no --resume)"
                )

    def stored(self) -> dict[str, int]:
        """Bytes of every component."""
        files = self.files().items()
        return {part: sum(file.stat().st_size for name, file in files if Path(name).parts[0] == part) for part in self.components}

    def files(self) -> dict[str, Path]:
        """What makes the pipeline, by path in the folder: files beside the components, and those of the components.

        Left out are hidden files, the whole model once more in one file for other programs, and folders that are no component: an
        output may lie in the folder of its source.
        """
        beside = [file for file in self.folder.iterdir() if not file.is_dir() and file.suffix not in WEIGHTS]
        files = [file for part in (beside, *(files_in(self.folder / name) for name in self.components)) for file in part]
        found = {str(file.relative_to(self.folder)): file for file in sorted(files)}
        return {name: file for name, file in found.items() if not any(word.startswith(".") for word in Path(name).parts)}


def _describes_model(folder: Path, library: str, kind: str) -> bool:
    """Whether a component's config is that of something with weights; diffusers calls those of schedulers differently."""
    config = read_config(folder)
    if library != "transformers":
        return CLASS in config
    import transformers

    return bool(config) and issubclass(getattr(transformers, kind, object), nn.Module)


def _versions() -> dict[str, str]:
    """Those of the libraries that sample and compute, where they are installed."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _stamp(file: Path) -> list[int]:
    return [file.stat().st_size, file.stat().st_mtime_ns]


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

    @property
    def opens(self) -> bool:
        """Whether the pipeline is opened: to sample, or because it knows where adapters belong."""
        return self.calibrates or bool(self.adapters)

    @property
    def offloaded(self) -> list[str]:
        """Text encoders so large that they stay on disk, too."""
        stored, modules = self.source.stored(), self.source.modules
        return [name for name, (library, _) in modules.items() if library == "transformers" and stored[name] > self.budget / LARGE]

    @property
    def resident(self) -> int:
        """Bytes of the components that are in memory as long as the pipeline is open."""
        here = set(self.source.modules) - set(self.source.disks) - set(self.offloaded)
        specs = [spec for name in here for spec in Shards.of(self.source.folder / name).specs.values()]
        return sum(spec.numel for spec in specs) * self.source.dtype.itemsize

    def identity(self) -> dict[str, Any]:
        """What must be the same for an interrupted run to go on."""
        kept = {name: sorted(row.layer.name for row in plan.kept) for name, plan in self.plans.items()}
        return {
            "reelquant": __version__,
            **_versions(),
            "recipe": {name: plan.recipe.digest() for name, plan in self.plans.items()},
            "layers": digest(kept),
            "dtype": str(self.source.dtype),
            "device": self.source.device,
            "prompts": digest(self.prompts),
            "call": digest(dict(self.call)),
            "adapters": {source: [scale, *_stamp(adapter_file(source)[1])] for source, scale in self.adapters.items()},
            "source": {name: _stamp(file) for name, file in self.source.files().items()},
        }

    def estimate(self) -> Estimate:
        """Time, memory and disk before anything is done."""
        return estimate(self.source.stored(), self.source.disks, self.plans, self.call, self.resident if self.opens else 0)

    @property
    def fits(self) -> bool:
        """Whether the way through memory is open."""
        return self.estimate().in_memory <= self.budget

    def seconds(self, expected: Estimate) -> float:
        """About how long it takes: one layer is loaded and rounded, its times count for all. Samplers and solvers come on top.

        Raises:
            RecipeError: if not even that layer fits.
        """
        expected.check_memory(self.budget)
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
        pipe = _pipeline(job, work) if job.opens else None
        report = _components(job, work, pipe, progress or Silent(), functools.partial(check_room, work, expected))
        _copy_others(job, work)
        report.save(work.result / REPORT_FILE)
        return report


def _components(job: Job, work: Workspace, pipe: Any, progress: Progress, room: Callable[[int], None]) -> Report:
    """Quantize every component and write its folder. ``room`` hears what an output takes that has to be remembered."""
    place, sessions = work.folder / "work", list[Streamed]()
    recipes = {name: plan.recipe for name, plan in job.plans.items()}
    texts = job.prompts or (default_texts(pipe, recipes) if job.calibrates else [])
    for name, plan in job.plans.items():
        journal, model = Journal(place / name / "journal", job.source.device, room), job.source.disks[name].model
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
                float_attention(session.denoiser)
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
    """The stock pipeline around denoisers, and large text encoders, that stay on disk.

    Raises:
        CheckpointError: if diffusers or transformers cannot open it.
    """
    try:
        return _open(job, work)
    except ReelQuantError:
        raise
    except Exception as error:
        raise cannot_open(job.source.folder, error) from error


def _open(job: Job, work: Workspace) -> Any:
    import diffusers

    source = job.source
    # Not DiffusionPipeline: it takes no note of components given to it that are optional for the real class, and loads them itself.
    kind = getattr(diffusers, str(source.index.get(CLASS)), diffusers.DiffusionPipeline)
    parts = {name: disk.model for name, disk in source.disks.items()}
    for name in job.offloaded:
        parts[name] = _text_encoder(source, name, source.modules[name][1], work.folder / "work" / "offload")
    pipe = kind.from_pretrained(source.folder, dtype=source.dtype, use_safetensors=True, **parts)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in parts:
            part.to(source.device)
    here = property(lambda self: torch.device(source.device))  # else the pipeline reads it off parameters, which are on the meta device
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {"device": here, "_execution_device": here})
    return pipe


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
        sampled_as: the phase of the last clips.
    """

    job: Job = field(kw_only=True)
    folder: Path = field(kw_only=True)
    peers: list[Streamed] = field(kw_only=True)
    journal: Journal = field(kw_only=True)
    sampled_as: str = ""

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
        self.sampled_as = f"sampled-{self.component}-{digest(steps, pieces, protected)}"
        with self.sampling(self.sampled_as):
            return super().held_out_latents(**overrides)

    def trial(self, assignment: Assignment, reference: Tensor) -> float:
        """A candidate's score; remembered, so that its layers need not be kept."""
        record = self.folder / "trials" / f"{digest({name: list(options.items()) for name, options in assignment.items()})}.json"
        if not record.is_file():
            score = super().trial(assignment, reference)
            whole_file(record, lambda path: path.write_text(json.dumps(score)))
            for peer in self.peers:
                peer.journal.forget(self.sampled_as)
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

    def attention(self) -> AttentionFacts | None:
        """What computes attention where the sampler runs."""
        return attention_facts(self.denoiser, torch.device(self.job.source.device).type)


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
    for name, file in job.source.files().items():
        if Path(name).parts[0] in job.plans or name == REPORT_FILE:
            continue
        target = work.result / name
        if not target.is_file():
            whole_file(target, lambda place, file=file: shutil.copyfile(file, place))
