"""Every check on every family; ``python -m tests.families.matrix`` publishes what they find."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.families.checks import CHECKS, Case, NotOurs
from tests.families.models import FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder: Path = tmp_path_factory.mktemp("family")
    return Case(FAMILIES[request.param], folder)


@pytest.mark.parametrize("check", CHECKS)
def test_matrix(case: Case, check: str) -> None:
    try:
        CHECKS[check](case)
    except NotOurs as reason:
        assert (case.family.title, check) in EXCUSED, reason
    else:
        assert (case.family.title, check) not in EXCUSED, "diffusers can do this now: take it off the list"


EXCUSED: set[tuple[str, str]] = set()
"""Cells that the float model of diffusers fails as well."""
