"""How much a process holds for tensors that come and go, in numbers worked by hand."""

from __future__ import annotations

from reelquant.planning.heap import HEADER, Event, Heap, apart, held

MB = 1 << 20
OWN = HEADER  # bytes of a chunk beside the tensor's


def take(tensor: int, size: int) -> Event:
    return Event(tensor, size)


def give(tensor: int, size: int = -1) -> Event:
    return Event(tensor, size)


def test_a_large_tensor_has_pages_of_its_own_which_go_with_it() -> None:
    heap = Heap()
    assert heap.follow([take(0, 40 * MB), give(0), take(1, 40 * MB)]) == 40 * MB + OWN
    assert (heap.end, heap.mapped) == (0, 40 * MB + OWN)


def test_a_hole_that_is_too_small_stays_and_the_heap_grows() -> None:
    heap = Heap()
    heap.follow([take(0, 10 * MB), take(1, 1 * MB), give(0), take(2, 12 * MB)])
    assert heap.end == 23 * MB + 3 * OWN  # 10 free, 1, 12


def test_the_smallest_hole_that_is_large_enough_is_taken() -> None:
    heap = Heap()
    events = [take(0, 10 * MB), take(1, MB), take(2, 6 * MB), take(3, MB), give(0), give(2), take(4, 5 * MB), take(5, 9 * MB)]
    heap.follow(events)
    assert heap.end == 18 * MB + 4 * OWN  # 5 went into the hole of 6, so 9 found that of 10


def test_holes_beside_each_other_become_one() -> None:
    heap = Heap()
    heap.follow([take(0, 5 * MB), take(1, 5 * MB), take(2, MB), give(0), give(1), take(3, 10 * MB)])
    assert heap.end == 11 * MB + 3 * OWN


def test_the_end_of_the_heap_goes_back_once_it_is_twice_the_threshold() -> None:
    heap = Heap()
    some = [take(number, 30 * MB) for number in range(3)]
    heap.follow([*some, give(2), give(1)])
    assert heap.end == 90 * MB + 3 * OWN  # 60 MB at the end are not enough
    heap.follow([give(0)])
    assert (heap.end, heap.peak) == (0, 90 * MB + 3 * OWN)


def test_a_second_round_finds_the_heap_of_the_first() -> None:
    events = [take(0, 8 * MB), take(1, 8 * MB), give(0), give(1)]
    assert held(events) == held(events, rounds=1) == 16 * MB + 2 * OWN


def test_small_tensors_fit_into_what_is_there() -> None:
    assert held([take(0, 100), take(1, 4000)]) == 0


def test_at_most_every_size_keeps_its_own_holes() -> None:
    events = [take(0, 10 * MB), give(0), take(1, 9 * MB), take(2, 9 * MB), give(1), take(3, 9 * MB), give(2), give(3)]
    assert apart(events) == (10 + 2 * 9) * MB
    assert held(events) == 18 * MB + 2 * OWN < apart(events)


def test_large_tensors_and_small_ones_are_no_holes() -> None:
    assert apart([take(0, 40 * MB), give(0), take(1, 50 * MB), give(1), take(2, 100)]) == 50 * MB
