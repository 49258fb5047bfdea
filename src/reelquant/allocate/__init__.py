"""Which layer gets which numbers, under a budget for the whole model, one file per algorithm. Formats themselves, and rules that a recipe
writes down, do not belong here.

Every member has a parameter ``bits``, the most stored bits per weight, mean over the layers that it chooses for, and a parameter
``calls``, how many recorded calls of the denoiser it measures on. :func:`allocate` does the same from a :class:`SensitivityTable`, which
is measured once for all budgets.
"""

from __future__ import annotations

import functools

from reelquant.allocate.budget import METHODS, Allocation, allocate
from reelquant.allocate.greedy import Greedy
from reelquant.allocate.milp import Milp
from reelquant.allocate.sampled import Sampled
from reelquant.allocate.steps import LayerBits, StepPlan, allocate_steps
from reelquant.allocate.surrogate import Surrogate
from reelquant.allocate.table import Configuration, Damage, LayerFacts, SensitivityTable, Tried, load_table
from reelquant.stages import Stage, register

ALLOCATORS: dict[str, type[Stage]] = {"milp": Milp, "greedy": Greedy, "sampled": Sampled, "surrogate": Surrogate}
register_allocator = functools.partial(register, ALLOCATORS, "allocator")

__all__ = [
    "ALLOCATORS",
    "METHODS",
    "Allocation",
    "Configuration",
    "Damage",
    "Greedy",
    "LayerBits",
    "LayerFacts",
    "Milp",
    "Sampled",
    "SensitivityTable",
    "StepPlan",
    "Surrogate",
    "Tried",
    "allocate",
    "allocate_steps",
    "load_table",
    "register_allocator",
]
