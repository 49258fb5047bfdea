"""A second observation: calls of the denoiser while the pipeline samples with what is quantized so far."""

from __future__ import annotations

from collections.abc import Sequence

from reelquant.engine.build import BuiltGroup
from reelquant.engine.session import Session
from reelquant.observe import RecordedCall
from reelquant.recipes.entry import Entry


def record_again(session: Session, entry: Entry, groups: Sequence[BuiltGroup]) -> Sequence[RecordedCall]:
    """Sample the texts of calibration with these groups quantized, and record as many calls as the stage wants, evenly over all.

    Arguments are what the quantized pipeline's own trajectories come by. Outputs are its own, too: what the float model gives for the
    same arguments is found by making the calls again without the groups. Probes are not sampled: no call of theirs is recorded.

    A store that remembers calls of the denoiser answers those of an interrupted run, and the recording is the same.
    """
    with session.having(groups):
        recorder = session.recorded(entry.name, session.texts.written, entry.stage.records, entry.position, halves=session.halves)
    return recorder.recording(session.timesteps)
