"""Recorded calls of a batch, taken apart into calls of single clips."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from reelquant.clock import BOTH
from reelquant.formats.criteria import nmse
from reelquant.observe import RecordedCall

PER_CALL = 2
"""So many clips of a recorded call are taken. Gradients of one clip point where those of its batch do, and cost a fraction."""
GOLDEN = (5**0.5 - 1) / 2
SAME = 1e-6
"""A clip alone and the same clip in a batch differ by the order of sums: squared error over variance is far below this."""


@dataclass(frozen=True)
class Cut:
    """How the tensors of a call follow its batch.

    Attributes:
        folded: whether a leading axis that is a multiple of the batch holds the batch as well (frames or prompts folded into it).
    """

    folded: bool

    def __call__(self, call: RecordedCall, count: int, place: int) -> RecordedCall:
        """One clip of a call of ``count``; of a call that holds both halves of guidance the clip in either half."""
        places = [place, place + count // 2] if call.half == BOTH else [place]

        def part(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.ndim or not self._follows(len(leaf), count):
                return leaf
            return leaf.unflatten(0, (count, -1))[places].flatten(0, 1)

        args, kwargs, output = tree_map(part, (call.args, dict(call.kwargs), call.output))
        return replace(call, args=args, kwargs=kwargs, output=output)

    def _follows(self, size: int, count: int) -> bool:
        return size == count or (self.folded and size > 0 and size % count == 0)


class OfClips(Sequence[RecordedCall]):
    """Calls of single clips out of recorded calls, cut when they are asked for.

    Args:
        calls: of batches.
        cut: how their tensors follow the batch.
        counts: items of each call's batch.
    """

    def __init__(self, calls: Sequence[RecordedCall], cut: Cut, counts: Sequence[int]) -> None:
        self.calls, self.cut, self.counts = calls, cut, counts
        self._places = list(_places([_clips(call, count) for call, count in zip(calls, counts, strict=True)]))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        number, place = self._places[index]
        return self.cut(self.calls[number], self.counts[number], place)


def _clips(call: RecordedCall, count: int) -> int:
    return count // 2 if call.half == BOTH else count


def _places(clips: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Call and clip of what is taken: other clips from one call to the next, spread evenly over all of them."""
    for number, count in enumerate(clips):
        taken = min(PER_CALL, count)
        first = int(count * (number * GOLDEN % 1))
        yield from ((number, (first + count * one // taken) % count) for one in range(taken))


def of_clips(calls: Sequence[RecordedCall], compute: Callable[[RecordedCall], Any]) -> Sequence[RecordedCall]:
    """Calls of single clips, :data:`PER_CALL` out of each; the calls as they are where they cannot be taken apart.

    Which tensors follow the batch is tried: the first clip of a call has to give what it gives inside of its batch.

    Args:
        compute: what the denoiser gives for a call.
    """
    counts = [_count(call.output) for call in calls]
    number = next((number for number, call in enumerate(calls) if _clips(call, counts[number]) > 1), None)
    if number is None or not all(counts):
        return calls
    tried, count = calls[number], counts[number]
    whole = compute(tried)
    for folded in (True, False):
        cut = Cut(folded)
        wanted = cut(replace(tried, output=whole), count, 0).output
        try:
            found = compute(cut(tried, count, 0))
        except (RuntimeError, ValueError, IndexError, TypeError):  # shapes that no longer fit: this is no way to cut
            continue
        if _same(_first(found), _first(wanted)):
            return OfClips(calls, cut, counts)
    return calls


def _count(output: Any) -> int:
    """Items of the batch that an output holds; 0 if it does not say."""
    first = _first(output)
    return 0 if first is None or not first.ndim else len(first)


def _same(found: Tensor | None, wanted: Tensor | None) -> bool:
    return found is not None and wanted is not None and found.shape == wanted.shape and float(nmse(found, wanted)) < SAME


def _first(output: Any) -> Tensor | None:
    return next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)
