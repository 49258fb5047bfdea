"""What a call leaves in a tokenizer does not get into the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reelquant.checkpoint import save
from reelquant.models.pipelines import open_pipeline
from tests.tiny.stock import stored_pipeline

FILE = Path("tokenizer", "tokenizer.json")
CALL: dict[str, Any] = {"padding": "max_length", "max_length": 9, "truncation": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_pipeline(tmp_path_factory.mktemp("model") / "wan")


def test_a_tokenizer_that_was_called_is_written_as_it_was_stored(source: Path, tmp_path: Path) -> None:
    pipe = open_pipeline(source)
    pipe.tokenizer(["a ball"], **CALL)
    backend = pipe.tokenizer.backend_tokenizer
    before = backend.padding, backend.truncation
    assert all(before)
    save(pipe, tmp_path / "called")
    assert (backend.padding, backend.truncation) == before
    save(open_pipeline(source), tmp_path / "fresh")
    assert (tmp_path / "called" / FILE).read_bytes() == (tmp_path / "fresh" / FILE).read_bytes()


def test_padding_that_was_stored_stays(source: Path, tmp_path: Path) -> None:
    pipe = open_pipeline(source)
    pipe.tokenizer(["a ball"], **CALL)
    pipe.tokenizer.save_pretrained(source.parent / "padded" / "tokenizer")
    pipe.register_to_config(_name_or_path=str(source.parent / "padded"))
    save(pipe, tmp_path / "out")
    assert '"padding": {' in (tmp_path / "out" / FILE).read_text()


def test_a_tokenizer_from_nowhere_is_written_as_it_is(source: Path, tmp_path: Path) -> None:
    pipe = open_pipeline(source)
    pipe.tokenizer(["a ball"], **CALL)
    pipe.register_to_config(_name_or_path="owner/name")
    save(pipe, tmp_path / "out")
    assert '"padding": {' in (tmp_path / "out" / FILE).read_text()
