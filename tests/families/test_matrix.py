"""Every check on every family; ``python -m tests.families.matrix`` publishes what they find."""

from __future__ import annotations

import pytest

from tests.families.checks import CHECKS, Case, UpstreamError
from tests.families.models import FAMILIES

NO_AUTO = ("ltx", "ltx-2", "allegro", "latte", "svd", "animatediff", "modelscope", "i2vgen-xl", "dit")
EXCUSED = {*((name, "device_map") for name in NO_AUTO), ("hunyuanvideo-1.5", "torch_compile"), ("dit", "torch_compile_with_group_offload")}
"""Cells that the float model of diffusers fails as well: no ``_no_split_modules``, a branch on a tensor's value, no group offloading."""


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("family"))


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # Mochi's own, in float as well
@pytest.mark.parametrize("check", CHECKS)
def test_matrix(case: Case, check: str) -> None:
    if (case.name, check) in EXCUSED:
        with pytest.raises(UpstreamError):
            CHECKS[check](case)
    else:
        CHECKS[check](case)
