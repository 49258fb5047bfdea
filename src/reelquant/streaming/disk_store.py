"""The store of a component whose tensors are in files: float shards, and a file for every quantized layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from reelquant._errors import CalibrationError
from reelquant._sums import Sealed
from reelquant.checkpoint import Shards
from reelquant.engine.build import Built, BuiltGroup, Context, build_layer, folded, prepare_group
from reelquant.engine.choice import Choice
from reelquant.engine.plan import Plan
from reelquant.nn import KernelFacts, QuantLayer, broken, get_module, is_finite
from reelquant.sites import Group
from reelquant.streaming.job import Job
from reelquant.streaming.journal import Journal
from reelquant.streaming.log import digest
from reelquant.streaming.offload import OnDisk
from reelquant.streaming.pieces import about, empty_layer, intact, read_about, record_in, write_piece

T = TypeVar("T")


@dataclass(eq=False)
class StoredGroup(BuiltGroup):
    """A group whose tensors are in files; ``pieces`` holds the files by module name."""

    pieces: dict[str, Shards] = field(default_factory=dict)


@dataclass(eq=False)
class DiskStore:
    """A :class:`reelquant.engine.store.Store` in files, which a run that resumes finds again.

    Attributes:
        job: the work.
        component: whose tensors these are.
        folder: where the files go.
        keeper: the journal of what was sampled.
        peers: the stores of all components, this one among them.
    """

    job: Job
    component: str
    folder: Path
    keeper: Journal
    peers: list[DiskStore]
    _phase: str = ""

    @property
    def disk(self) -> OnDisk:
        """The float model in its shards."""
        return self.job.source.disks[self.component]

    @property
    def plan(self) -> Plan:
        """What happens to the component."""
        return self.job.plans[self.component]

    @property
    def device(self) -> str | None:
        """Type of device where the sampler runs."""
        return torch.device(self.job.source.device).type

    def check_weights(self, plan: Plan) -> None:
        """Refuse what stays float if it is not finite; layers that are quantized are checked when they are built."""
        quantized = {row.layer.name for row in plan.quantized}
        for name in self.disk.model.state_dict():
            layer, _, tensor = name.rpartition(".")
            if layer not in quantized and not is_finite(self.disk.load(name)):
                raise CalibrationError(broken(tensor, layer or type(self.disk.model).__name__))

    def float_layer(self, name: str) -> nn.Module:
        """A float layer, read from its shard."""
        return self.disk.layer(name)

    def copy(self, name: str) -> nn.Module:
        """A copy of a part with its tensors in memory."""
        return self.disk.filled_copy(name)

    def running(self) -> AbstractContextManager[None]:
        """Inside, the denoiser runs block by block."""
        return self.disk.running(self.disk.present(self.plan.map.blocks), self.plan.map.apart)

    def begun(self, phase: str, run: Callable[[], T], *content: Any) -> Callable[[], T]:
        """The pipeline samples block by block, and denoiser calls of an interrupted run answer from disk."""
        self._phase = f"{phase}-{self.component}-{digest(content, self._installed_files())}"
        with ExitStack() as stack:
            for name, disk in self.job.source.disks.items():
                plan = self.job.plans.get(name, self.plan)
                stack.enter_context(disk.running(disk.present(plan.map.blocks), disk.present(plan.map.apart)))
            for peer in self.peers:
                stack.enter_context(peer.keeper.remembering(peer.disk.model, self._phase))
            result = run()
        return lambda: result

    def each(self, phase: str, scores: Sequence[Callable[[], float]]) -> list[float]:
        """One after the other."""
        return [score() for score in scores]

    def _installed_files(self) -> dict[str, str]:
        return {
            f"{peer.component}.{name}": str(shards.files[0].relative_to(peer.folder))
            for peer in self.peers
            for name, shards in peer.disk.pieces.items()
        }

    def observed(self) -> None:
        """Calls after calibration draw no rows."""
        self.keeper.forget_generator()

    def score(self, key: Any, sample: Callable[[], float]) -> float:
        """A candidate's score; remembered, so that its layers need not stay on disk."""
        record = self.folder / "trials" / f"{digest(key)}.json"
        if not intact(record):
            score = sample()
            Sealed(record.parent).write(record.name, lambda path: path.write_text(json.dumps(score)))
            for peer in self.peers:
                peer.keeper.forget(self._phase)
            if self.plan.recipe.search.scope == "model":
                self.drafts_done()
        return json.loads(record.read_text(encoding="utf-8"))

    def drafts_done(self) -> None:
        """Remove the files of drafts."""
        shutil.rmtree(self.folder / "draft", ignore_errors=True)

    def group(self, context: Context, group: Group, choice: Choice) -> StoredGroup:
        """Make those layers of a group that are not on disk yet, one after the other."""
        rows = [context.plan.layers[name] for name in group.layers if context.plan.layers[name].skipped is None]
        place = self.folder / ("draft" if context.draft else "final") / choice.digest(rows)
        files = {row.layer.name: place / f"{row.layer.name}.safetensors" for row in rows}
        norm = place / f"{group.producer}.safetensors"
        missing = [row for row in rows if not intact(files[row.layer.name])]
        if not missing and any(read_about(file)["norm"] for file in files.values()) and not intact(norm):
            missing = rows
        if missing:
            shared = prepare_group(context, group, choice)
            if shared.fold is not None and group.producer is not None:
                affine = dict(self.disk.layer(group.producer).named_parameters(recurse=False))
                write_piece(norm, folded(affine, shared.fold), {})
            for row in missing:
                one = build_layer(context, shared, row, choice)
                write_piece(files[row.layer.name], one.layer.state_dict(), about(one.layer, one.record, norm=shared.fold is not None))
                del one
        pieces = {name: Shards([file]) for name, file in files.items()}
        layers = {name: empty_layer(get_module(self.disk.model, name), file) for name, file in files.items()}
        records = [] if context.draft else [record for file in files.values() if (record := record_in(file))]
        folds = {group.producer: Shards([norm])} if group.producer is not None and norm.is_file() else {}
        return StoredGroup(group, layers, None, records, pieces=pieces | folds)

    def improved(self, built: BuiltGroup, name: str, one: Built, key: Any) -> None:
        """Write a better version of one layer beside the earlier one."""
        file = self.folder / "final" / digest(key) / f"{name}.safetensors"
        write_piece(file, one.layer.state_dict(), about(one.layer, one.record))
        self._use(built, name, file)

    def _use(self, built: BuiltGroup, name: str, file: Path) -> None:
        assert isinstance(built, StoredGroup)
        built.pieces[name] = Shards([file])
        built.layers[name] = empty_layer(get_module(self.disk.model, name), file)
        better = record_in(file)
        built.records = [better if better and record.name == name else record for record in built.records]

    def known(self, key: Any, groups: Sequence[BuiltGroup]) -> Any:
        """What was remembered of a block; its better layers are taken into their groups again."""
        folder = self.folder / "final" / digest(key)
        if not intact(folder / "done.json"):
            return None
        done = json.loads((folder / "done.json").read_text())
        if not all(intact(folder / file) for file in done["files"]):
            return None
        for built in groups:
            for name in built.layers:
                if f"{name}.safetensors" in done["files"]:
                    self._use(built, name, folder / f"{name}.safetensors")
        return done["value"]

    def remember(self, key: Any, value: Any) -> None:
        """A block is done; its better layers have been written."""
        folder = self.folder / "final" / digest(key)
        done = {"value": value, "files": sorted(file.name for file in folder.glob("*.safetensors"))}
        Sealed(folder).write("done.json", lambda path: path.write_text(json.dumps(done)))

    def installed(self, built: BuiltGroup) -> None:
        """Tell the disk where the tensors of a group are."""
        assert isinstance(built, StoredGroup)
        self.disk.pieces |= built.pieces

    def removed(self) -> None:
        """Back to the float files."""
        self.disk.pieces.clear()

    def kernels(self) -> KernelFacts:
        """What would compute the layers, as each said when it was built."""
        names = [name for name, part in self.disk.model.named_modules() if isinstance(part, QuantLayer)]
        return KernelFacts.of(read_about(self.disk.pieces[name].files[0])["facts"] for name in names)
