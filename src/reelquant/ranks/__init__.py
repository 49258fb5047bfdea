"""Several processes that share one piece of work: who this one is, where all of them meet, and who makes what.

``environment`` reads what a launcher said, ``meeting`` agrees and watches, ``units`` shares work out by files, ``claim`` holds
their folder. What the work is belongs to
the layers above.
"""

from reelquant.ranks.claim import claimed
from reelquant.ranks.environment import Rank, this_rank
from reelquant.ranks.meeting import Meeting, meeting
from reelquant.ranks.units import Units

__all__ = ["Meeting", "Rank", "Units", "claimed", "meeting", "this_rank"]
