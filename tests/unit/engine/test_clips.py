"""Calls of single clips out of calls of batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reelquant.clock import ANY, BOTH
from reelquant.engine.clips import PER_CALL, of_clips
from reelquant.observe import RecordedCall

TABLE = torch.randn(12, 5)  # as long as a multiple of the batch, and not of it


def denoiser(latent: Tensor, text: Tensor, table: Tensor, *, folded: bool) -> tuple[Tensor, str]:
    """Latents ``[b, 6, 5]`` with a text for each clip, or for each of its 3 frames, and a table of places."""
    text = text.unflatten(0, (-1, 3)).sum(1) if folded else text
    return latent * text[:, None] + table.sum() * latent.mean((1, 2), keepdim=True), "word"


def calls(count: int, batch: int, *, folded: bool, half: int = ANY, table: Tensor = TABLE) -> list[RecordedCall]:
    found = []
    for _ in range(count):
        latent = torch.randn(batch, 6, 5)
        if half == BOTH:
            latent[batch // 2 :] = latent[: batch // 2]
        args = (latent, torch.randn(batch * 3 if folded else batch, 5))
        rest: dict[str, Any] = {"table": table, "folded": folded}
        found.append(RecordedCall(args, rest, denoiser(*args, **rest), 0, half))
    return found


def compute(call: RecordedCall) -> Any:
    return denoiser(*call.args, **call.kwargs)


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize(("half", "items"), [(ANY, 1), (BOTH, 2)])
def test_a_clip_gives_what_it_gives_in_its_batch(folded: bool, half: int, items: int) -> None:
    table = TABLE[:5] if folded else TABLE
    whole = calls(7, 4, folded=folded, half=half, table=table)
    found = of_clips(whole, compute)
    assert len(found) == 7 * PER_CALL
    for number, call in enumerate(found):
        batch = whole[number // PER_CALL]
        assert len(call.args[0]) == items and call.half == half
        torch.testing.assert_close(compute(call)[0], call.output[0])
        places = [place for place in range(4) if any(torch.equal(batch.args[0][place], one) for one in call.args[0])]
        assert places and (half != BOTH or len(places) == 2)
    taken = {float(call.args[0][0, 0, 0]) for call in found}
    assert len(taken) == len(found)  # no clip twice


def test_calls_that_cannot_be_cut_stay() -> None:
    one = calls(3, 1, folded=False)
    assert of_clips(one, compute) is one
    mixed = calls(3, 4, folded=False)
    assert of_clips(mixed, lambda call: (call.args[0] - call.args[0].mean(0), "")) is mixed  # clips of a batch see each other
    assert len(of_clips([*one, *mixed], compute)) == 3 + 3 * PER_CALL  # a last batch that is smaller
