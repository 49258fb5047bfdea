"""The folder of an evaluation: a killed run continues from it, and memory does not grow with the clips.

run.json               what is evaluated; a run with other settings does not continue here
clips/VARIANT/0000.mp4 clips as they are made, every 8-bit pixel kept
latents/VARIANT/       latents after every step, of the first clips
measured/VARIANT.jsonl a row per clip: figures and curves
saturation/VARIANT.jsonl a row per pipeline call: what quantized layers clipped
features/VARIANT/      what the networks of FVD, FID and KID see in each clip
speed.json             times and peak memory, if they were asked for

Clips, tensors and rows have sums (``SHA256SUMS`` in their folders, ``sha256`` in rows): what is not what was written is made again.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reelquant._errors import CheckpointError
from reelquant._sums import OWN, UNFINISHED, Sealed, json_sum
from reelquant.evidence.media import write_video
from reelquant.models.blank import read_json

RUN = "run.json"


@dataclass(frozen=True)
class Store:
    """The folder of one evaluation.

    Attributes:
        root: the folder.
        again: what an error about the disk says of going on.
    """

    root: Path
    again: str = "continue with --resume, or choose another --output"

    def begin(self, settings: Mapping[str, Any], *, resume: bool, force: bool) -> None:
        """Claim the folder for these settings.

        Raises:
            CheckpointError: if it holds another evaluation, or the same one and neither ``resume`` nor ``force`` was
                asked for.
        """
        file = self.root / RUN
        if file.is_file() and not force:
            before = read_state(file)
            if not resume:
                raise CheckpointError(f"'{self.root}' already holds an evaluation; pass --resume to continue it or --force to replace it")
            changed = [key for key in settings if not _continues(key, before.get(key), settings[key])]
            if changed:
                what = "; ".join(f"{key} was {_short(before.get(key))}, is {_short(settings[key])}" for key in changed[:3])
                raise CheckpointError(f"'{self.root}' holds another evaluation ({what}); choose another --output or pass --force")
        elif not file.is_file() and self.root.is_dir() and any(self.root.iterdir()):
            raise CheckpointError(f"'{self.root}' is not empty and holds no evaluation; choose another --output")
        elif file.is_file():
            self._clear()
        for left in self.root.rglob(f".*{UNFINISHED}*"):
            left.unlink(missing_ok=True)
        write_json(file, settings)

    def leave(self) -> None:
        """Remove what :meth:`begin` wrote if nothing was made since, and the folder if it is empty."""
        made = [file for file in self.root.rglob("*") if file.is_file() and file != self.root / RUN]
        if not made:
            (self.root / RUN).unlink(missing_ok=True)
            with suppress(OSError):
                self.root.rmdir()

    def borrow(self, other: Path, settings: Mapping[str, Any]) -> None:
        """Take over what another evaluation made of the float pipeline: clips, latents and features, linked or copied.

        Raises:
            CheckpointError: if it is not an evaluation of the same float pipeline, texts, noise and call.
        """
        if not (other / RUN).is_file():
            raise CheckpointError(f"no evaluation in '{other}': it has no {RUN}")
        before = read_state(other / RUN)
        changed = [key for key in settings if key != "test" and not _continues(key, before.get(key), settings[key])]
        if changed:
            what = "; ".join(f"{key} is {_short(before.get(key))} there and {_short(settings[key])} here" for key in changed[:3])
            raise CheckpointError(f"the evaluation in '{other}' is of other clips: {what}")
        for source in sorted(other.rglob("*"), key=lambda file: (file.name != Sealed.LIST, file)):  # a file is listed before it is there
            place = source.relative_to(other)
            if source.is_file() and _of_float(place):
                take_over(source, self.root / place)

    def _clear(self) -> None:
        import shutil

        for name in ("clips", "latents", "measured", "features", "saturation"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        (self.root / "speed.json").unlink(missing_ok=True)

    def clip(self, variant: str, name: str) -> Path:
        """Where a sampled clip lies."""
        return self.root / "clips" / variant / f"{name}.mp4"

    def has_clip(self, variant: str, name: str) -> bool:
        """Whether a clip is there as it was written, and its latents, if they were kept."""
        file, latents = self.clip(variant, name), self.tensor_file("latents", variant, name)
        return file.is_file() and not any(Sealed(one.parent).lost(one.name) for one in (file, latents))

    def put_clip(self, variant: str, name: str, clip: Tensor, fps: float) -> None:
        """Write a clip, every 8-bit pixel kept, complete or not at all.

        Raises:
            CheckpointError: if the disk does not take it.
        """
        file = self.clip(variant, name)
        with self._writing(file):
            Sealed(file.parent).write(file.name, lambda path: write_video(clip, path, fps, lossless=True))

    @contextmanager
    def _writing(self, file: Path) -> Iterator[None]:
        """One kind of error for a disk that does not take a file."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            yield
        except (OSError, SafetensorError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"cannot write '{file}': {error}; free space and {self.again}") from error

    # --- rows ---------------------------------------------------------------------------------------------------------

    def rows(self, variant: str) -> dict[str, dict[str, Any]]:
        """Measured rows by clip; later lines add to earlier ones."""
        rows: dict[str, dict[str, Any]] = {}
        for row in self._lines("measured", variant):
            merged = rows.setdefault(row["name"], {"name": row["name"], "sources": [], "figures": {}, "curves": {}})
            merged["sources"] += row["sources"]
            merged["figures"] |= row["figures"]
            merged["curves"] |= row["curves"]
        return rows

    def add(self, variant: str, row: Mapping[str, Any]) -> None:
        """Append a row; it is on disk when this returns."""
        self._append("measured", variant, row)

    def counts(self, variant: str) -> dict[int, Any]:
        """What layers clipped while clips were sampled, by the first clip of each call; a call that was made again counts once."""
        return {row["first"]: row["layers"] for row in self.counted(variant)}

    def reused(self, variant: str) -> dict[int, Any]:
        """What was computed and what was reused, like :meth:`counts`; empty rows without reuse."""
        return {row["first"]: row.get("reuse") or {} for row in self.counted(variant)}

    def counted(self, variant: str) -> list[dict[str, Any]]:
        """Rows as :meth:`add_counts` takes them."""
        return [{key: value for key, value in row.items() if key != OWN} for row in self._lines("saturation", variant)]

    def add_counts(self, variant: str, row: Mapping[str, Any]) -> None:
        """Append what was counted in one call: ``first``, the number of its first clip, what ``layers`` clipped, and ``reuse``."""
        self._append("saturation", variant, row)

    def _lines(self, kind: str, variant: str) -> Iterator[dict[str, Any]]:
        """The rows of a file; a line that was cut short by a kill, or damaged, is ignored."""
        file = self.root / kind / f"{variant}.jsonl"
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            if (row := _row(line, ROWS[kind])) is not None:
                yield row

    def _append(self, kind: str, variant: str, row: Mapping[str, Any]) -> None:
        file = self.root / kind / f"{variant}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = not file.is_file() or file.read_bytes()[-1:] in (b"", b"\n")
        plain = json.loads(json.dumps(dict(row)))
        with self._writing(file), file.open("a", encoding="utf-8") as opened:
            opened.write(("" if whole else "\n") + json.dumps(plain | {OWN: json_sum(plain)}) + "\n")
            opened.flush()
            os.fsync(opened.fileno())

    # --- tensors ------------------------------------------------------------------------------------------------------

    def tensor_file(self, kind: str, variant: str, name: str) -> Path:
        """Where a tensor of a clip lies; kinds are ``latents``, ``i3d``, ``inception``."""
        return self.root / ("latents" if kind == "latents" else "features") / variant / f"{name}.{kind}.safetensors"

    def has(self, kind: str, variant: str, name: str) -> bool:
        """Whether that tensor is there."""
        file = self.tensor_file(kind, variant, name)
        return file.is_file() and not Sealed(file.parent).lost(file.name)

    def put(self, kind: str, variant: str, name: str, value: Tensor) -> None:
        """Write a tensor, complete or not at all."""
        file = self.tensor_file(kind, variant, name)
        with self._writing(file):
            Sealed(file.parent).write(file.name, lambda path: save_file({kind: value.contiguous()}, path))

    def get(self, kind: str, variant: str, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            CheckpointError: if the file is broken.
        """
        file = self.tensor_file(kind, variant, name)
        try:
            return load_file(file)[kind]
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(f"cannot read '{file}' ({error}); delete it and resume, it will be made again") from None


ROWS: dict[str, dict[str, type]] = {  # what rows hold
    "measured": {"name": str, "sources": list, "figures": dict, "curves": dict},
    "saturation": {"first": int, "layers": dict},
}


def _row(line: str, kinds: Mapping[str, type]) -> dict[str, Any] | None:
    """A row of a file; None for one that was cut short or damaged, which is measured again. Rows of older versions have no sum."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or (OWN in row and row[OWN] != json_sum(row)):
        return None
    return row if all(isinstance(row.get(key), kind) for key, kind in kinds.items()) else None


def _continues(key: str, before: Any, now: Any) -> bool:
    """Whether a setting is unchanged; more or fewer clips than before are fine if the first ones are the same."""
    if key in ("prompts", "seeds", "conditions") and isinstance(before, list) and isinstance(now, list):
        return all(a == b for a, b in zip(before, now, strict=False))
    return before == now


def _of_float(place: Path) -> bool:
    """Whether a file of an evaluation's folder depends on the float pipeline alone."""
    folder, *rest = place.parts
    if folder == "measured":
        return rest[0] != "test.jsonl"
    return folder in ("clips", "latents", "features") and rest[0] != "test" and not rest[0].startswith("test-")


def take_over(source: Path, target: Path) -> None:
    """Link a file that nothing changes, copy one that grows; a list of sums is appended to the one that is there."""
    import shutil

    target.parent.mkdir(parents=True, exist_ok=True)
    if source.name == Sealed.LIST:
        with target.open("a", encoding="utf-8") as opened:
            opened.write(source.read_text(encoding="utf-8", errors="replace"))
        return
    if target.exists():
        return
    if source.suffix == ".jsonl":  # rows are appended to
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_json(file: Path, data: Any) -> None:
    """Write JSON, complete or not at all."""
    write_text(file, json.dumps(data, indent=2, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write text, complete or not at all.

    Raises:
        CheckpointError: if the place cannot be written to.
    """
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        raise CheckpointError(f"cannot write '{file}': {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def read_state(file: Path) -> dict[str, Any]:
    """What a file of the folder says of the run.

    Raises:
        CheckpointError: if it is damaged.
    """
    try:
        return read_json(file)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or pass --force to start again") from None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
