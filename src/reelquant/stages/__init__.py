"""What a stage of a recipe is, and what it works on. Members live in the folders of their axes and do not belong here."""

from reelquant.observe import RecordedCall
from reelquant.stages.block import BlockWork
from reelquant.stages.group import GroupView, magnitude
from reelquant.stages.layer import LayerWork, Solution, Specs, StageSite
from reelquant.stages.model import ModelWork
from reelquant.stages.ranges import Ranges, bound, follows, nearest_seen
from reelquant.stages.rewrite import Rewrite, is_plain
from reelquant.stages.scales import storable
from reelquant.stages.stage import HOOKS, Hook, Stage, register

__all__ = [
    "HOOKS",
    "BlockWork",
    "GroupView",
    "Hook",
    "LayerWork",
    "ModelWork",
    "Ranges",
    "RecordedCall",
    "Rewrite",
    "Solution",
    "Specs",
    "Stage",
    "StageSite",
    "bound",
    "follows",
    "is_plain",
    "magnitude",
    "nearest_seen",
    "register",
    "storable",
]
