"""Files of conditions: prompts of the kinds people have (plain text, JSON lines, VBench's and PartiPrompts' lists), pictures, clips and
classes beside them or instead, folders of pictures; and the bundled video prompts.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from reelquant._errors import CalibrationError, nearest
from reelquant.models.condition import ARGUMENTS, Condition
from reelquant.models.conditions import CONDITIONS
from reelquant.models.media import CLIPS, PICTURES, is_file_name, stored

STRESSES = ("motion", "camera", "texture", "people", "text", "stillness")
TEXT_KEYS = ("prompt", "prompt_en", "text", "caption")  # prompt_en is VBench's
GROUP_KEYS = ("dimension", "dimensions", "stress", "category")  # what a list of prompts groups them by
BESIDE = ("seed", "name", "challenge", "note", "auxiliary_info", "id", "index")  # other columns of published lists; those with _ as well
FORMS = (
    "plain text (.txt) with one prompt a line, .jsonl, .json or .yaml with the key 'prompt', .csv or .tsv with a column prompt, "
    "or a folder of pictures"
)


def read_prompts(path: str | Path) -> list[str]:
    """The texts of a file; see :func:`load_conditions`.

    Raises:
        CalibrationError: if there is no file, nothing in it, or it cannot be understood.
    """
    return [one.text for one in load_conditions(path)]


def load_conditions(path: str | Path) -> list[Condition]:
    """The conditions of a file or folder, in its order, repeated ones included.

    Kinds of files, by the ending, and by the content if it is ``.txt`` or there is none:

    - plain text, one prompt a line; blank lines and lines that start with # are skipped;
    - ``.jsonl``: ``{"prompt": ..., "image": "first.png", "seed": 3, "name": "a", "dimension": "motion"}`` a line;
    - ``.json``: a list of such objects or of texts, as ``VBench_full_info.json`` (``prompt_en``, ``dimension``);
    - ``.yaml``, ``.yml``: the same list in YAML;
    - ``.csv``, ``.tsv``: a header with ``Prompt`` and perhaps ``Category``, as PartiPrompts. Texts with commas stand between double
      quotes in CSV; quotes mean nothing in TSV. Empty cells are not given;
    - a folder: one condition for each picture or clip in it, by name; a ``.txt`` of the same stem is its prompt;
    - one picture or clip.

    Beside the text, seed, name and group of a prompt, a field is an argument of the pipeline call (``image``, ``last_image``, ``video``,
    ``mask``, ``class_labels``, ``negative_prompt`` ...) or one of :data:`~reelquant.models.condition.ARGUMENTS`; whether the pipeline
    takes it is checked later. Values that are paths of pictures, clips, folders of frames or tensors are relative to the file.

    Files with other endings are refused: what they hold would be read as text in silence.

    Raises:
        CalibrationError: naming file and line, if there is no file, nothing in it, it is broken, or what it names cannot be used.
    """
    file = Path(path)
    if os.path.isdir(file):  # false also for names that a disk refuses, where Path.is_dir() raises
        return _read_folder(file)
    if not os.path.isfile(file):
        what = "is not a plain file" if os.path.exists(file) else "does not exist"
        raise CalibrationError(f"prompt file '{path}' {what}; give {FORMS}")
    suffix = file.suffix.lower()
    if suffix in MEDIA:
        return [_of_media(file, None)]
    if suffix not in READERS:
        raise CalibrationError(f"prompt file '{path}' ends in {file.suffix}, which says nothing about how to read it; give {FORMS}")
    found = READERS[suffix](_decoded(file), file)
    if not found:
        raise CalibrationError(f"prompt file '{path}' holds no prompt: write one text per line")
    return found


def bundled_prompts(stress: str | None = None) -> list[str]:
    """The 96 video prompts that come with the library, or the 16 that stress one thing.

    Args:
        stress: one of :data:`STRESSES`; without it the kinds take turns, so that the first six prompts are one of each.

    Raises:
        CalibrationError: for an unknown stress.
    """
    if stress is not None and stress not in STRESSES:
        raise CalibrationError(f"no bundled prompts stress '{stress}'; {nearest(stress, STRESSES)}")
    file = Path(str(resources.files("reelquant.models").joinpath("prompts_video.jsonl")))
    return [prompt.text for prompt in load_conditions(file) if stress is None or stress in prompt.dimensions]


# ----------------------------------------------------------------------------------------------------------------- decoding


def _decoded(file: Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CalibrationError(f"cannot read the prompt file '{file}' ({error.strerror})") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CalibrationError(f"prompt file '{file}' is UTF-16; save it as UTF-8")
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise CalibrationError(f"{file}:{line}: a zero byte: this is not a text file; give {FORMS}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise CalibrationError(f"{file}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from None


def _reader_for(text: str) -> Callable[[str, Path], list[Condition]]:
    """By the content; a text that merely starts with a bracket stays plain text."""
    first = text.lstrip().split("\n", 1)[0]
    guesses: tuple[tuple[str, str, Callable[[str, Path], list[Condition]]], ...] = (("{", first, _read_jsonl), ("[", text, _read_json))
    for opening, part, reader in guesses:
        if first.startswith(opening) and _is_json(part):
            return reader
    return _read_text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------------------ readers


def _read_text(text: str, file: Path) -> list[Condition]:
    lines = [line.strip() for line in text.split("\n")]  # not splitlines: texts may hold U+2028
    return [Condition(line) for line in lines if line and not line.startswith("#")]


def _read_jsonl(text: str, file: Path) -> list[Condition]:
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON texts may hold U+2028
        if line.strip() and not line.lstrip().startswith("#"):
            prompts.append(_condition(_parsed(line, file, number), file, f"{file}:{number}"))
    return prompts


def _read_json(text: str, file: Path) -> list[Condition]:
    if not text.strip():
        return []
    entries = _parsed(text, file, 1)
    if not isinstance(entries, list):
        raise CalibrationError(f"{file}:1: a JSON {type(entries).__name__} where a list of prompts was expected; write [{{...}}, ...]")
    return [_condition(entry, file, f"{file}, entry {i}") for i, entry in enumerate(entries, 1)]


def _read_tsv(text: str, file: Path) -> list[Condition]:
    return _read_columns(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE), file)


def _read_csv(text: str, file: Path) -> list[Condition]:
    return _read_columns(csv.DictReader(io.StringIO(text, newline=""), strict=True), file)


def _read_columns(rows: csv.DictReader[str], file: Path) -> list[Condition]:
    try:
        names = [name.strip().lower() for name in rows.fieldnames or ()]
        if names and not set(names) & {*TEXT_KEYS, *KNOWN}:
            columns = ", ".join(rows.fieldnames or ())
            raise CalibrationError(f"{file}:1: no column {', '.join(TEXT_KEYS)}; the columns are {columns}. Name one of them so")
        rows.fieldnames = names
        return [_condition(_filled(row, f"{file}:{rows.line_num}"), file, f"{file}:{rows.line_num}") for row in rows]
    except csv.Error as error:
        raise CalibrationError(f"{file}:{rows.line_num + 1}: {error}; put texts with commas between double quotes") from None


def _filled(row: dict[Any, Any], where: str) -> dict[str, Any]:
    """The cells of a row that hold something; numbers as numbers where they are no texts."""
    if None in row:  # csv's key for cells beyond the header
        raise CalibrationError(f"{where}: more cells than the header has; put texts with commas between double quotes")
    return {key: _number(value) if key in KNOWN and "prompt" not in key else value for key, value in row.items() if value}


def _number(cell: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few of them can stand for billions of entries."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="an alias", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def _read_yaml(text: str, file: Path) -> list[Condition]:
    try:
        entries = yaml.load(text, Loader=_PlainLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise CalibrationError(f"{file}:{line}: broken YAML: {error.problem}; write a list: - a red circle") from None
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise CalibrationError(f"{file}: broken YAML: {error}; write a list: - a red circle") from None
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise CalibrationError(f"{file}: a YAML {type(entries).__name__} where a list of prompts was expected; write - a red circle")
    return [_condition(entry, file, f"{file}, entry {i}") for i, entry in enumerate(entries, 1)]


READERS: dict[str, Callable[[str, Path], list[Condition]]] = {
    "": lambda text, file: _reader_for(text)(text, file),
    ".txt": lambda text, file: _reader_for(text)(text, file),
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
}


def _parsed(text: str, file: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{file}:{line + error.lineno - 1}"
        raise CalibrationError(f'{where}: broken JSON at column {error.colno}: {error.msg}; write {{"prompt": "..."}}') from None


def _condition(entry: Any, file: Path, where: str) -> Condition:
    """A condition from a text or an object: its text under one of :data:`TEXT_KEYS`, and inputs of the pipeline."""
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        raise CalibrationError(f'{where}: {entry!r} is not a prompt; write {{"prompt": "..."}}')
    entry = {str(key): value for key, value in entry.items() if value is not None}
    text = next((entry[key] for key in TEXT_KEYS if key in entry), "")
    inputs = {key: _input(value, key, file, where) for key, value in entry.items() if not _beside(key)}
    if not isinstance(text, str) or not (text.strip() or inputs.keys() & KNOWN):
        keys = ", ".join(entry) or "none"
        raise CalibrationError(f'{where}: no text under {", ".join(TEXT_KEYS)} (keys: {keys}); write {{"prompt": "..."}}')
    groups = next((entry[key] for key in GROUP_KEYS if key in entry), None)
    name = entry.get("name")
    return Condition(text.strip(), _seed(entry.get("seed"), where), None if name is None else str(name), _words(groups), inputs, where)


KNOWN = {*ARGUMENTS, *CONDITIONS}  # what a clip can be made from without a text


def _beside(key: str) -> bool:
    """Whether a field says something else than an input of the pipeline."""
    return key in (*TEXT_KEYS, *GROUP_KEYS, *BESIDE) or key.startswith("_")


def _input(value: Any, key: str, file: Path, where: str) -> Any:
    """A value as it is, or a file, if it is the name of one; the same for the entries of a list."""
    if isinstance(value, list):
        return [_input(one, key, file, where) for one in value]
    words = "prompt" in key and key not in CONDITIONS  # negative_prompt and the like
    if not isinstance(value, str) or words or not (is_file_name(value) or os.path.isdir(file.parent / value)):
        return value
    try:
        return stored(file.parent / value)
    except CalibrationError as error:
        raise CalibrationError(f"{where}: {key}: {error}") from None


MEDIA = (*PICTURES, *CLIPS)
FIELDS = {"picture": "image", "frames": "video"}  # what a file alone is


def _read_folder(folder: Path) -> list[Condition]:
    """A condition for each picture or clip, by name, and the texts beside them."""
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    media = [file for file in files if file.is_file() and file.suffix.lower() in MEDIA]
    stems, texts = {file.stem for file in media}, {file.stem: file for file in files if file.suffix.lower() == ".txt"}
    for file in files:
        if file not in media and not (file.suffix.lower() == ".txt" and file.stem in stems):
            raise CalibrationError(f"folder '{folder}' is read as pictures with their texts, and '{file.name}' is neither; take it out")
    if len(stems) < len(media):
        raise CalibrationError(f"folder '{folder}' holds two files of one name, so that their text has two meanings; rename one")
    if not media:
        raise CalibrationError(f"prompt folder '{folder}' holds no picture or clip; give {FORMS}")
    return [_of_media(file, texts.get(file.stem)) for file in media]


def _of_media(file: Path, text: Path | None) -> Condition:
    words, value = "" if text is None else " ".join(_decoded(text).split()), stored(file)
    return Condition(words, name=file.stem, inputs={FIELDS[value.kind]: value}, where=str(file))


def _seed(value: Any, where: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not str(value).isdecimal():
        raise CalibrationError(f"{where}: seed {value!r} is not a whole number of 0 or more")
    return int(value)


def _words(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else () if value is None else (str(value),)
