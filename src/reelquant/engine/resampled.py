"""A second observation: calls of the denoiser while the pipeline samples with what is quantized so far."""

from __future__ import annotations

from collections.abc import Sequence

from reelquant.engine.build import BuiltGroup
from reelquant.engine.calibration import Expected
from reelquant.engine.recorder import Recorder
from reelquant.engine.session import Session
from reelquant.models.conditions import at_once
from reelquant.models.sampling import sample
from reelquant.observe import RecordedCall
from reelquant.recipes.entry import Entry


def record_again(session: Session, entry: Entry, groups: Sequence[BuiltGroup]) -> Sequence[RecordedCall]:
    """Sample the texts of calibration with these groups quantized, and record as many calls as the stage wants, evenly over all.

    Arguments are what the quantized pipeline's own trajectories come by. Outputs are its own, too: what the float model gives for the
    same arguments is found by making the calls again without the groups. Probes are not sampled: no call of theirs is recorded.

    A store that remembers calls of the denoiser answers those of an interrupted run, and the recording is the same.
    """
    assert session.recipe.calibrate is not None
    batch = at_once(type(session.pipe), session.arguments, session.recipe.calibrate.batch, session.texts.written)
    expected = Expected.of(len(session.texts.written), batch, session.arguments)
    options = {"batch": batch, "output": "latent", "on_step": session.advance} | session.arguments

    def run() -> Recorder:
        recorder = Recorder.of(session.denoiser, session.plan, entry.stage.records, expected.calls, halves=session.halves)
        with recorder.watching(session.denoiser):
            sample(session.pipe, session.texts.written, seed=session.seed, first=0, **options)
        return recorder

    with session.timed(f"sample for {entry.name}", expected.calls), session.having(groups):
        return session.store.begun("resampled", run, entry.position)().recording(session.timesteps)
