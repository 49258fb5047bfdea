"""Which layer gets which numbers, under a budget for the whole model, one file per algorithm. Formats themselves, and rules that a recipe
writes down, do not belong here.

Every member has a parameter ``bits``, the most stored bits per weight, mean over the layers that it chooses for, and a parameter
``calls``, how many recorded calls of the denoiser it measures on.
"""

from __future__ import annotations

import functools

from reelquant.allocate.milp import Milp
from reelquant.stages import Stage, register

ALLOCATORS: dict[str, type[Stage]] = {"milp": Milp}
register_allocator = functools.partial(register, ALLOCATORS, "allocator")

__all__ = ["ALLOCATORS", "Milp", "register_allocator"]
