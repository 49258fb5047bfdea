"""The base class of exact rewrites."""

from __future__ import annotations

from abc import abstractmethod

from reelquant.stages import GroupView, Rewrite, Stage


class Transform(Stage):
    """A change of a layer's input and weight that keeps the float output, planned from statistics of the input.

    The statistics ``range``, ``rows`` and ``features`` are always there; :attr:`Stage.statistics` names further ones.
    """

    @abstractmethod
    def plan(self, group: GroupView) -> Rewrite:
        """The rewrite for one group of layers that share an input."""

    def rewrite(self, group: GroupView) -> GroupView:
        return group.rewritten(self.plan(group))
