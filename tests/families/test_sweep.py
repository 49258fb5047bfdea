"""Every other denoiser of the installed diffusers opens quantized; most are probed, and then they also run."""

from __future__ import annotations

import pytest

from tests.families.sweep import attempt, unlisted


@pytest.mark.filterwarnings("ignore")  # whatever 58 classes of diffusers have to say about tiny sizes
@pytest.mark.parametrize("name", unlisted())
def test_a_denoiser_that_nobody_listed_is_quantized(name: str) -> None:
    found = attempt(name)
    assert found.quantized > 0
    if name in OUTLINED:
        assert found.refusal, "it is probed now: take it off the list"
    else:
        assert found.refusal is None, found.refusal
        assert found.error is not None and found.error > 20


OUTLINED: frozenset[str] = frozenset()
"""Classes whose arguments cannot be made up from their configurations."""
