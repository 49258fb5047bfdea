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


ALWAYS = ("inference", "quantized_layers", "reuse")
"""Checks whose result depends on the family: they run on every one."""

SOME = ("wan-2.1", "hunyuanvideo", "ltx", "sd")
"""Four kinds of wiring: cross-attention, double streams, packed tokens (no device map in diffusers), a UNet (those with layers over time
have two or three times the layers)."""

CHOSEN = {"torch_compile": ("wan-2.1", "flux"), "torch_compile_with_group_offload": (), "serialization": (*SOME, "mochi", "flux", "svd")}
"""Checks with families of their own: those that compile take long; saving is also tried where layers over time are convolutions."""

CELLS = [
    (name, check) for name in FAMILIES for check in CHECKS if ALL or check in ALWAYS or name in CHOSEN.get(check, SOME)
]  # the other checks hardly depend on the family


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
