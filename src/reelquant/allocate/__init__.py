"""Which layer gets which numbers, under a budget for the whole model. One file per algorithm; the table is what recipes can name."""

from __future__ import annotations

import functools

from reelquant.stages import Stage, register

ALLOCATORS: dict[str, type[Stage]] = {}
register_allocator = functools.partial(register, ALLOCATORS, "allocator")

__all__ = ["ALLOCATORS", "register_allocator"]
