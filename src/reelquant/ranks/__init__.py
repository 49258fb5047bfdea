"""Several processes that share one piece of work: who this one is, where all of them meet, and who makes what.

``environment`` reads what a launcher said, ``meeting`` agrees and watches, ``units`` shares work out by files. What the work is belongs to
the layers above.
"""

from reelquant.ranks.environment import Rank, this_rank
from reelquant.ranks.meeting import Meeting, claimed, meeting
from reelquant.ranks.units import Units, find

__all__ = ["Meeting", "Rank", "Units", "claimed", "find", "meeting", "this_rank"]
