"""Recorded calls: what comes back from memory and from files, and what goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reelquant.clock import FIRST, SECOND
from reelquant.observe import RecordedCall, Recording

BYTES = 2 * 4 * 3  # of a call: argument and output, three float32 numbers each


def made(budget: int, folder: Path) -> Recording:
    recording = Recording(budget, folder)
    for number in range(4):
        x = torch.full((3,), float(number))
        recording.append(RecordedCall((x, "word"), {"scale": None}, (x + 1,), half=SECOND if number % 2 else FIRST))
        x += 100  # what a model writes later is not recorded
    recording.number([3, 2, 1, 0])
    return recording


@pytest.mark.parametrize("budget", [0, 2 * BYTES, 4 * BYTES])
def test_calls_come_back_as_they_were_wherever_they_are(budget: int, tmp_path: Path) -> None:
    recording = made(budget, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4 - budget // BYTES and recording.held == budget
    for number, call in enumerate(recording):
        assert call.args[0].tolist() == [number] * 3 and call.output[0].tolist() == [number + 1] * 3
        assert call.args[1] == "word" and call.kwargs == {"scale": None}
        assert call.step == 3 - number and call.half == (SECOND if number % 2 else FIRST)


def test_calls_that_go_leave_neither_memory_nor_files(tmp_path: Path) -> None:
    recording = made(2 * BYTES, tmp_path)
    recording.keep([1, 3])
    assert [call.step for call in recording] == [2, 0] and recording.held == BYTES and len(list(tmp_path.iterdir())) == 1
    recording.close()
    assert not len(recording) and recording.held == 0 and not list(tmp_path.iterdir())
