"""Quantize a pipeline's folder without ever holding the float model: tensors come from its shards and go to new ones.

The engine is the one that works in memory; only its store differs. The denoiser is :class:`~reelquant.streaming.offload.OnDisk`,
statistics are in a :class:`~reelquant.streaming.journal.Journal`, and every quantized layer is a file until all are there. All three
remember what has been done, so a run that was stopped goes on by running again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reelquant._progress import Progress, Silent
from reelquant._remarks import remarks
from reelquant.checkpoint import REPORT_FILE, Shards, Workspace, refuse_source, workspace, write_card
from reelquant.discover import modules_of
from reelquant.engine.components import default_texts
from reelquant.engine.report import Report, total
from reelquant.engine.run import run_all
from reelquant.engine.session import Session
from reelquant.models.condition import fitted
from reelquant.models.defaults import missing, notice
from reelquant.models.lora import short_names
from reelquant.models.manifest import write_manifest
from reelquant.models.weight_files import weight_bytes
from reelquant.nn import check_finite, check_tensors, stop_clock
from reelquant.streaming.disk_store import DiskStore
from reelquant.streaming.estimate import check_room
from reelquant.streaming.job import Job
from reelquant.streaming.journal import Journal
from reelquant.streaming.pipeline import merging, open_pipeline
from reelquant.streaming.write import copy_others, write_component


def quantize_folder(job: Job, output: str | Path, *, resume: bool = False, force: bool = False, progress: Progress | None = None) -> Report:
    """Do the work: the folder appears complete or not at all, and what is done stays for ``resume``.

    Returns:
        The report, as it is written to ``report.json``.

    Raises:
        CheckpointError: no room, a folder that may not be written, another process at work, an interrupted run about something else.
        CalibrationError: weights or inputs that are not finite.
        UnsupportedError: for what needs the model in memory.
    """
    job.check()
    refuse_source(output, job.source.folder)
    expected = job.estimate()
    expected.check_memory(job.budget)
    with workspace(output, job.identity(), resume=resume, force=force) as work:
        check_room(work, expected)
        _check_copied(job)
        pipe = open_pipeline(job, work) if job.opens else None
        for name, part in modules_of(pipe).items() if pipe is not None else ():
            check_finite(name, part)
        room = functools.partial(check_room, work, expected)
        report = _components(job, work, pipe, progress or Silent(), room)
        copy_others(job, work)
        report.bytes_source, report.bytes_folder = (
            weight_bytes(folder / name for name in job.source.modules) for folder in (job.source.folder, work.result)
        )
        report.save(work.result / REPORT_FILE)
        write_card(work.result)
        write_manifest(work.result)
        return report


def _check_copied(job: Job) -> None:
    """Look at what is not quantized: the other components, and what is no layer of the denoisers, one tensor at a time."""
    for name in job.source.modules:
        shards = Shards.of(job.source.folder / name)
        planned = {row.layer.name for row in job.plans[name].layers.values()} if name in job.plans else set()
        check_tensors(name, [key for key in shards.specs if key.rpartition(".")[0] not in planned], shards.load)


def _components(job: Job, work: Workspace, pipe: Any, progress: Progress, room: Callable[[int], None]) -> Report:
    """Quantize every component and write its folder. ``room`` is called with the size of a remembered denoiser output."""
    place, stores = work.folder / "work", list[DiskStore]()
    for name in job.plans:
        journal = Journal(place / name / "journal", job.source.device, room)
        stores.append(DiskStore(job, name, place / name, journal, stores))
    sessions = [Session(pipe, store.component, store.disk.model, store.plan, store, progress) for store in stores]
    recipes = {name: plan.recipe for name, plan in job.plans.items()}
    texts = job.prompts or (default_texts(pipe, recipes, job.call) if job.calibrates else [])
    with remarks() as told, merging(job, pipe):
        bundled = missing(pipe, fitted(type(pipe), texts), job.call) if job.calibrates else {}
        try:
            reports = run_all(sessions, {}, texts, dict(job.call) | bundled, [notice(type(pipe), bundled)])
            for session in sessions:
                with session.timed("write", 1):
                    write_component(session, work)
        finally:
            for session in reversed(sessions):
                stop_clock(session.denoiser)
                session.roll_back()
    report = total(reports)
    report.warnings += told
    report.adapters = short_names(job.adapters)
    report.source = job.source.origin
    return report
