"""A tiny float pipeline on disk, as stock diffusers writes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.attack.sources import float_pipeline


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed: the tests of a file share it."""
    return float_pipeline(tmp_path_factory.mktemp("source") / "wan")


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """One that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "wan"))
