"""How much a denoiser multiplies in one step, and how fast that could go: the limit that charts draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.speed import machine


def _attention(query: Any, key: Any, value: Any, *others: Any, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""What eager attention is on a CPU; torch does not count it by itself."""


def counted(run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The result, and multiplications and additions in billions: of linear and convolution layers, and of attention."""
    with FlopCounterMode(display=False, custom_mapping={ATTENTION: _attention}) as counter:
        result = run()
    total, found = counter.get_total_flops(), counter.get_flop_counts().get("Global", {})
    inside = sum(count for name, count in found.items() if "attention" in str(name) or "bmm" in str(name))
    return result, {"layers_gop": (total - inside) / 1e9, "attention_gop": inside / 1e9}


def least_seconds(work: dict[str, float], limits: dict[str, Any]) -> float:
    """The time of a step whose layers run at the peak of int8, whose attention runs at that of floats, and all else is free."""
    return 1e9 * (work["layers_gop"] / machine.peak(limits, "int8") + work["attention_gop"] / machine.peak(limits, machine.FLOAT))
