"""A tiny float pipeline on disk, as stock diffusers writes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.attack import disks
from tests.attack.sources import float_pipeline


@pytest.fixture(scope="session", autouse=True)
def _compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Limits of processor time are for what a command does, not for what is compiled once for an installation."""
    folder = tmp_path_factory.mktemp("compiled")
    disks.compile_loops(float_pipeline(folder / "wan"), folder / "out")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed: the tests of a file share it."""
    return float_pipeline(tmp_path_factory.mktemp("source") / "wan")


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """One that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "wan"))
