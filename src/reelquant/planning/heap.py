"""How much memory a process holds while tensors come and go: glibc's allocator, which serves the larger part of them from one heap.

A tensor of at least 32 MiB gets pages of its own, and they go when it goes. Smaller ones lie in one heap: the smallest hole that is large
enough is taken, else the heap grows, and it shrinks only at its end. So a process holds more than its tensors have. The rules are those of
malloc(3) and mallopt(3): the mapping threshold follows the largest mapped chunk that was freed, up to 32 MiB, where it is in a process that
has loaded a model; the heap is cut when the hole at its end is twice as large as that. What other threads allocate, and small things that
lie between the holes, are not followed: :func:`held` is the least that a process holds, and :func:`apart` the most.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

MOST = 32 << 20  # bytes: the threshold of a process that has loaded a model
SMALL = 4096  # bytes: what is smaller fits into holes that are there anyway
ALIGN = 64
HEADER = 64


@dataclass(frozen=True)
class Event:
    """A tensor's memory was taken, or given back (``size`` is negative).

    Attributes:
        tensor: a number of its own.
        size: bytes.
    """

    tensor: int
    size: int


@dataclass
class Heap:
    """The memory of a process.

    Attributes:
        threshold: bytes from which a chunk is mapped.
        end: bytes of the heap.
        mapped: bytes of mapped chunks.
        peak: most bytes of both together.
    """

    threshold: int = MOST
    end: int = 0
    mapped: int = 0
    peak: int = 0
    _holes: list[tuple[int, int]] = field(default_factory=list)  # (start, stop), sorted
    _chunks: dict[int, tuple[int, int]] = field(default_factory=dict)  # tensor -> (start, size); a mapped one starts at -1

    def follow(self, events: Iterable[Event]) -> int:
        """Take and give back memory as the events say; the peak so far, bytes."""
        for event in events:
            if event.size > 0:
                self._take(event.tensor, event.size)
            else:
                self._give(event.tensor)
        return self.peak

    def _take(self, tensor: int, size: int) -> None:
        if size < SMALL:
            return
        size = -(-size // ALIGN) * ALIGN + HEADER
        if size >= self.threshold:
            self.mapped += size
            self._chunks[tensor] = -1, size
        else:
            self._chunks[tensor] = self._place(size), size
        self.peak = max(self.peak, self.mapped + self.end)

    def _place(self, size: int) -> int:
        fitting = [(stop - start, start, stop) for start, stop in self._holes if stop - start >= size]
        last = self._holes[-1] if self._holes and self._holes[-1][1] == self.end else None
        inner = [one for one in fitting if last is None or one[1] != last[0]]
        if inner:  # the end of the heap is taken only if no hole fits
            _, start, stop = min(inner)
            self._holes.remove((start, stop))
            if stop - start > size:
                bisect.insort(self._holes, (start + size, stop))
            return start
        start = self.end if last is None else last[0]
        if last is not None:
            self._holes.pop()
            if last[1] > start + size:
                self._holes.append((start + size, last[1]))
        self.end = max(self.end, start + size)
        return start

    def _give(self, tensor: int) -> None:
        if tensor not in self._chunks:
            return
        start, size = self._chunks.pop(tensor)
        if start < 0:
            self.mapped -= size
            return
        stop = start + size
        place = bisect.bisect(self._holes, (start, stop))
        if place < len(self._holes) and self._holes[place][0] == stop:
            stop = self._holes.pop(place)[1]
        if place and self._holes[place - 1][1] == start:
            start = self._holes.pop(place - 1)[0]
            place -= 1
        if stop == self.end and stop - start > 2 * self.threshold:
            self.end = start
        else:
            self._holes.insert(place, (start, stop))


def held(events: Iterable[Event], rounds: int = 2) -> int:
    """Most bytes that a process holds beyond what it held before, in a run that repeats the events on one heap."""
    heap, events = Heap(), list(events)
    for _ in range(rounds):
        heap.follow(events)
    return heap.peak


def apart(events: Iterable[Event]) -> int:
    """Most bytes that a process holds beyond what it held before, if a hole only ever takes a tensor of the size that left it.

    A tensor is aligned, so it needs a hole a little larger than itself: where small things have taken the rest, the hole that a tensor of
    its size has left does for none of the larger ones, and smaller ones leave pieces.
    """
    now, most, sizes = Counter[int](), Counter[int](), dict[int, int]()
    mapped = peak = 0
    for event in events:
        size = sizes.setdefault(event.tensor, event.size) if event.size > 0 else sizes.pop(event.tensor)
        sign = 1 if event.size > 0 else -1
        if size >= MOST:
            mapped += sign * size
            peak = max(peak, mapped)
        elif size >= SMALL:
            now[size] += sign
            most[size] = max(most[size], now[size])
    return peak + sum(size * count for size, count in most.items())
