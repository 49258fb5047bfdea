"""Checks on families: every check and every family in ``make test``, each on each in ``make test-all``.

``python -m tests.families.matrix`` publishes what all of them find.
"""

from __future__ import annotations

import pytest

from tests.families.checks import CHECKS, Case, UpstreamError
from tests.families.models import FAMILIES
from tests.grids import ALL

NO_AUTO = ("ltx", "ltx-2", "allegro", "latte", "svd", "animatediff", "modelscope", "i2vgen-xl", "dit")
EXCUSED = {*((name, "device_map") for name in NO_AUTO), ("hunyuanvideo-1.5", "torch_compile"), ("dit", "torch_compile_with_group_offload")}
"""Cells that the float model of diffusers fails as well: no ``_no_split_modules``, a branch on a tensor's value, no group offloading."""


SOME = ("wan-2.1", "hunyuanvideo", "ltx", "animatediff")
"""Four kinds of wiring: cross-attention, double streams, packed tokens (no device map in diffusers), a UNet with motion modules."""

COMPILED = (*SOME, "mochi", "sd")
"""Two streams of different width, and a stock image UNet, are compiled as well."""

ONLY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("dtype_assignment", "config_serialization", "sharded_serialization", "original_dtype"), SOME),
    **dict.fromkeys(("modules_to_not_convert", "num_parameters", "device_map", "cpu_device_map"), SOME),
    **dict.fromkeys(("torch_compile", "torch_compile_with_group_offload", "training"), COMPILED),
}
"""Check -> the families it runs on in ``make test``: these checks hardly depend on the family, or take long. The others run on all."""

CELLS = [(name, check) for name in FAMILIES for check in CHECKS if ALL or name in ONLY.get(check, FAMILIES)]


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("family"))


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # Mochi's own, in float as well
@pytest.mark.parametrize(("case", "check"), CELLS, indirect=["case"])
def test_matrix(case: Case, check: str) -> None:
    if (case.name, check) in EXCUSED:
        with pytest.raises(UpstreamError):
            CHECKS[check](case)
    else:
        CHECKS[check](case)
