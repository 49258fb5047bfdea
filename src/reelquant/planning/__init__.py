"""Which bits for which card: what a pipeline takes in memory and time, before anything is loaded.

    from reelquant.planning import plan_memory
    plan_memory("wan-1.3b", "12GB", call={"num_frames": 81, "height": 480, "width": 832}).best

One file per question: ``parts`` (components without weights), ``rehearsal`` (a clip that is made without computing it), ``trace`` (what a
call computes and holds), ``heap`` (what a process holds for it), ``rounding`` (what quantization changes in that), ``kept`` (what stays
from step to step), ``memory`` (peaks), ``timing`` and ``speed`` (times of this machine), ``quality`` (what was measured), ``formats`` (a
format for every layer), ``candidates`` and ``plan`` (what fits). Memory and time of quantizing itself do not belong here
(:mod:`reelquant.streaming.estimate`).
"""

from reelquant.planning.plan import Planned, Way, plan_memory

__all__ = ["Planned", "Way", "plan_memory"]
