"""Sampling the clips of an evaluation: every variant from the same texts and noise, each clip written at once."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelquant._errors import CalibrationError, RecipeError, UnsupportedError, nearest
from reelquant._progress import Progress, Silent
from reelquant.discover import denoiser_of
from reelquant.evidence.clips import Clip
from reelquant.evidence.media import FPS
from reelquant.evidence.reading import read_video
from reelquant.evidence.reused import ReusedSteps
from reelquant.evidence.rounded import round_to_bf16
from reelquant.evidence.shared import SharedClips
from reelquant.evidence.store import Store
from reelquant.evidence.temporal import BROKEN
from reelquant.evidence.tripwires import check_frames, check_latents, find_in_frames
from reelquant.models.condition import Prompts, as_condition
from reelquant.models.pipelines import locate, open_pipeline
from reelquant.models.sampling import call_arguments, sample
from reelquant.models.single_file import single_file
from reelquant.nn import Saturation

KEPT_LATENTS = 16  # clips of which the whole trajectory is kept
LATENT_BYTES = 4_000_000_000  # on disk, at most, for a variant
COUNTED = 4  # in one of so many steps, saturation is counted
OTHER_NOISE = 1_000_000  # added to the seeds of the floor that draws other noise


@dataclass(frozen=True)
class ClipSource:
    """Where a pipeline comes from.

    Attributes:
        model: bundled name, folder, hub id, or a pipeline object.
        dtype: of the float parts.
        device: where it runs.
        compiled: the denoiser goes through ``torch.compile``.
        files: variant of the weight files of a folder or hub id, ``fp16``.
        rounded: weights and outputs of layers are rounded to bfloat16, see :mod:`reelquant.evidence.rounded`.
    """

    model: Any
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    compiled: bool = False
    files: str | None = None
    rounded: bool = False

    @property
    def name(self) -> str:
        """The name in reports."""
        if (single := single_file(self.model)) is not None:
            return single.file.name
        return Path(self.model).name if isinstance(self.model, str | Path) else type(self.model).__name__

    @property
    def identity(self) -> str:
        """Changes when the files of a folder change; unique for a pipeline in memory."""
        if not isinstance(self.model, str | Path):
            return f"{self.name} in memory at {id(self.model):x}"
        if (single := single_file(self.model)) is not None:
            return _digest([_state(single.file), single.component, replace(self, model=single.rest).identity])
        folder = Path(locate(self.model))
        if not folder.is_dir():
            return str(self.model)
        files = sorted(file for file in folder.rglob("*") if file.suffix in (".safetensors", ".json"))
        return _digest([f"{file.relative_to(folder)} {_state(file)}" for file in files])

    def open(self) -> Any:
        """The pipeline; one in memory is copied if it has to change."""
        if isinstance(self.model, str | Path):
            pipe = open_pipeline(self.model, self.dtype, self.device, self.files)
        else:
            pipe = self.model if self._fits() else copy.deepcopy(self.model).to(self.dtype)
        if self.rounded:
            round_to_bf16(pipe)
        if self.compiled:
            component, denoiser = denoiser_of(pipe)
            setattr(pipe, component, torch.compile(denoiser))
        return pipe

    def _fits(self) -> bool:
        denoiser = denoiser_of(self.model)[1]
        return not self.compiled and not self.rounded and any(parameter.dtype == self.dtype for parameter in denoiser.parameters())


def _state(file: Path) -> str:
    return f"{file.stat().st_size} {file.stat().st_mtime_ns}"


def _digest(lines: Sequence[str]) -> str:
    import hashlib

    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Variant:
    """One way to make the clips.

    Attributes:
        source: the pipeline.
        shift: added to every seed.
        words: for progress bars.
        about: what it is, for reports; empty for the two sides.
        counted: whether what its layers clip is asked for: a call without its row is made again.
    """

    source: ClipSource
    shift: int = 0
    words: str = ""
    about: str = ""
    counted: bool = False


FLOORS: dict[str, Callable[[ClipSource], Variant]] = {
    "bf16": lambda float_: Variant(
        replace(float_, dtype=torch.bfloat16), words="float in bf16", about="the float pipeline again from the same noise, in bfloat16"
    ),
    "rounded": lambda float_: Variant(
        replace(float_, rounded=True),
        words="float rounded to bf16",
        about="the float pipeline again from the same noise, in float32 with weights and outputs of layers rounded to bfloat16",
    ),
    "float32": lambda float_: Variant(
        replace(float_, dtype=torch.float32), words="float in float32", about="the float pipeline again from the same noise, in float32"
    ),
    "compiled": lambda float_: Variant(
        replace(float_, compiled=True), words="float compiled", about="the float pipeline again from the same noise, compiled"
    ),
    "reseed": lambda float_: Variant(
        float_, OTHER_NOISE, "float from other noise", "the float pipeline again from other noise: what another draw changes"
    ),
}


def floors(names: Sequence[str], reference: ClipSource) -> dict[str, Variant]:
    """Variants of the float pipeline that measure the noise floor.

    Raises:
        RecipeError: for an unknown one.
        UnsupportedError: for one that computes exactly as the reference does.
    """
    same = {torch.bfloat16: ("bf16", "rounded"), torch.float32: ("float32",)}
    for name in names:
        if name not in FLOORS:
            raise RecipeError(f"unknown noise floor '{name}'; {nearest(name, (*FLOORS, 'none'))}")
        if name in same.get(reference.dtype, ()):
            others = ", ".join(other for other in FLOORS if other not in same[reference.dtype])
            number = str(reference.dtype).removeprefix("torch.")
            raise UnsupportedError(f"floor '{name}': the reference runs in {number} itself; choose another floor: {others}")
    return {name: FLOORS[name](reference) for name in FLOORS if name in names}


@dataclass(frozen=True)
class SamplingJob:
    """Which clips are made.

    Attributes:
        store: where they go.
        prompts: one text or condition per clip; texts are empty where the pipeline takes none.
        seeds: noise of each clip.
        call: arguments of the pipeline call, conditions among them.
        batch: clips per call; a resumed run cuts the clips in the same places.
        progress: receives the progress.
        shared: the calls of several processes, of which this one makes some; None to make all.
    """

    store: Store
    prompts: Prompts
    seeds: Sequence[int]
    call: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 4
    progress: Progress = field(default_factory=Silent)
    shared: SharedClips | None = None

    @property
    def names(self) -> list[str]:
        """Names of the clips."""
        return [f"{i:04d}" for i in range(len(self.prompts))]

    def clips(self, variant: str) -> dict[str, Clip]:
        """The clips of a variant, once they are made."""
        return {name: Clip(name, (self.store.clip(variant, name),)) for name in self.names}

    def left(self, name: str, variant: Variant) -> list[range]:
        """The calls of the pipeline that are still to be made, each as the numbers of its clips."""
        chunks = [range(start, min(start + self.batch, len(self.prompts))) for start in range(0, len(self.prompts), self.batch)]
        counted = self.store.counts(name)
        return [
            chunk
            for chunk in chunks
            if not all(self.store.has_clip(name, self.names[i]) for i in chunk) or (variant.counted and chunk[0] not in counted)
        ]

    def make(self, name: str, variant: Variant) -> None:
        """Make what is missing of a variant's clips; of several processes, each makes its own and writes them where they are shared."""
        left, units = self.left(name, variant), None if self.shared is None else self.shared.units(name)
        left = [chunk for chunk in left if units is None or units.due(self._number(chunk))]
        if not left:
            return
        pipe = variant.source.open()
        steps = call_arguments(pipe, **self.call).get("num_inference_steps") or 50
        self.progress.phase(f"sample {variant.words or name}", len(left) * steps)
        for chunk in left:
            with nullcontext(self.store.root) if units is None else units.making(self._number(chunk)) as folder:
                replace(self, store=replace(self.store, root=folder))._chunk(pipe, name, variant, chunk)
        del pipe
        gc.collect()

    def _number(self, chunk: range) -> int:
        return chunk[0] // self.batch

    def take_over(self, variants: Mapping[str, Variant]) -> bool:
        """Put what all processes made into the evaluation's folder; False in all processes but the first, which does it."""
        assert self.shared is not None
        if not self.shared.meeting.rank.first:
            return False
        for name, variant in variants.items():
            self.shared.take_over(name, [self._number(chunk) for chunk in self.left(name, variant)])
        return True

    def _chunk(self, pipe: Any, name: str, variant: Variant, chunk: range) -> None:
        course: list[Tensor] = []
        words = variant.words or name

        def at_step(step: int, latents: Tensor) -> None:
            check_latents(latents, step, f"{words}, clips {chunk[0]} to {chunk[-1]}")
            if chunk[0] < KEPT_LATENTS:
                course.append(latents.detach().float().cpu())

        with self._counting(pipe, name, variant, chunk):  # counts are written last: a call without them is made again
            frames = sample(
                pipe,
                [self.prompts[i] for i in chunk],
                seeds=[self.seeds[i] + variant.shift for i in chunk],
                first=chunk[0],
                batch=len(chunk),
                on_step=self.progress.advance,
                on_latents=at_step,
                **self.call,
            ).float()
            self._keep(frames, course, name, words, chunk)

    def _keep(self, frames: Tensor, course: Sequence[Tensor], name: str, words: str, chunk: range) -> None:
        """Write the clips of a call, and their latents after every step if those are few enough."""
        for row, i in enumerate(chunk):
            clip = frames[row] if frames.ndim == 5 else frames[row][None]
            text = as_condition(self.prompts[i]).text
            self._stop_if_broken(clip, name, i, f"{i} of {words}" + (f" ('{text}')" if text else ""))
            if course and course[0].shape[0] == len(chunk) and course[0][0].numel() * len(course) * 4 * KEPT_LATENTS <= LATENT_BYTES:
                self.store.put("latents", name, self.names[i], torch.stack([latents[row] for latents in course]))
            self.store.put_clip(name, self.names[i], clip.cpu(), FPS)

    @contextmanager
    def _counting(self, pipe: Any, name: str, variant: Variant, chunk: range) -> Iterator[None]:
        """Count what a quantized denoiser clips in some of the steps: others for every chunk."""
        denoiser = denoiser_of(pipe)[1]
        seen, turn, before = Saturation(), chunk[0] // self.batch % COUNTED, ReusedSteps.of(denoiser)
        with seen.counting(denoiser, lambda step: step % COUNTED == turn):
            yield
        if seen.layers or variant.counted:
            reused = ReusedSteps.of(denoiser).since(before)
            self.store.add_counts(name, {"first": chunk[0], "layers": seen.counts(), "reuse": reused.to_json()})

    def saturation(self, name: str) -> Saturation:
        """What a variant's clips were clipped, as far as it was counted."""
        seen = Saturation()
        for counts in self.store.counts(name).values():
            seen.include(counts)
        return seen

    def reused(self, name: str) -> ReusedSteps:
        """What a variant computed and what it reused while its clips were made, as far as it was counted."""
        found = ReusedSteps()
        for counts in self.store.reused(name).values():
            found = found.plus(ReusedSteps.from_json(counts))
        return found

    def _stop_if_broken(self, clip: Tensor, variant: str, i: int, words: str) -> None:
        """End the run if a clip is not finite, or is all black, of one colour or saturated and the reference is not."""
        if not bool(clip.isfinite().all()):
            check_frames(clip, words)
        name = self.names[i]
        file = self.store.clip("reference", name) if self.shared is None else self.shared.reference(i // self.batch, name)
        reference = read_video(file) if variant != "reference" and file.is_file() else None
        for broken in BROKEN.values():
            frames = broken(clip.cpu())
            if bool(frames.all()) and not (reference is not None and bool(broken(reference).all())):
                raise CalibrationError("; ".join(find_in_frames(clip, words)))
