"""What need not be computed, found out on the quantized pipeline itself: trajectories are recorded, schedules planned from their errors,
the best tried out on other texts. How a schedule acts on a model is in :mod:`reelquant.reuse` and does not belong here.

``material`` chooses texts and noise, ``recording`` samples and notes, ``sampled`` says which damages to plan with, ``trials`` tries out,
``search`` chooses, ``run`` does all of it, ``curve`` draws.
"""

from reelquant.tuning.recording import Seconds
from reelquant.tuning.run import Tuned, tune
from reelquant.tuning.search import Goal
from reelquant.tuning.trials import Trial

__all__ = ["Goal", "Seconds", "Trial", "Tuned", "tune"]
