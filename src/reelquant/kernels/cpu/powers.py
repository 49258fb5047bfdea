"""Powers of two and the activations made of them, number by number, in a form that compilers turn into vector instructions.

``exp`` of numba is a call per number. ``2^x`` is a polynomial of the fraction of x, with its integer part added to the exponent's bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from reelquant.kernels.cpu.options import EXACT, compiled

VECTOR: dict[str, Any] = EXACT | {"fastmath": EXACT["fastmath"] | {"nnan"}, "error_model": "numpy"}
"""There is no vector instruction for a minimum that propagates NaN, nor for a division that checks for zero."""
LOWEST, HIGHEST = np.float32(-126), np.float32(126)  # exponents of normal numbers
SERIES = tuple(np.float32(math.log(2) ** k / math.factorial(k)) for k in range(7))
"""``2^f`` for ``-0.5 <= f <= 0.5`` by rising powers of f; what is left out is 1.2e-7 of it at most."""
LOG2_E = np.float32(math.log2(math.e))
TANH = np.float32(2 * math.sqrt(2 / math.pi))
ERF = tuple(np.float32(c) for c in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429))
ERF_SLOPE = np.float32(0.3275911)
HALF_ROOT = np.float32(math.sqrt(0.5))
ACTIVATION_CODES: dict[str, int] = {"": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "relu": 4}
"""Activation -> how :func:`activate` calls it."""


@intrinsic
def times_power(typing: Any, number: Any, power: Any) -> Any:
    """``number * 2^power`` for a float32 and an int32, by adding to the exponent; both and the result are normal numbers."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        integer = ir.IntType(32)
        raised = builder.shl(arguments[1], ir.Constant(integer, 23))
        return builder.bitcast(builder.add(builder.bitcast(arguments[0], integer), raised), ir.FloatType())

    return types.float32(types.float32, types.int32), code


@compiled(**VECTOR)
def power(x: Any) -> Any:
    """``2^x`` of a float32 between the exponents of normal numbers; beyond them that of the nearest one."""
    x = min(max(x, LOWEST), HIGHEST)
    whole = np.rint(x)
    f = x - whole
    series = ((((SERIES[6] * f + SERIES[5]) * f + SERIES[4]) * f + SERIES[3]) * f + SERIES[2]) * f + SERIES[1]
    return times_power(series * f + SERIES[0], np.int32(whole))


@compiled(**VECTOR)
def _logistic(x: Any) -> Any:
    return np.float32(1) / (np.float32(1) + power(-x * LOG2_E))


@compiled(**VECTOR)
def _normal(x: Any) -> Any:
    """The normal distribution function, by formula 7.1.26 of Abramowitz and Stegun: off by 8e-8 at most."""
    z = abs(x) * HALF_ROOT
    t = np.float32(1) / (np.float32(1) + ERF_SLOPE * z)
    tail = ((((ERF[4] * t + ERF[3]) * t + ERF[2]) * t + ERF[1]) * t + ERF[0]) * t * power(-z * z * LOG2_E) * np.float32(0.5)
    return np.float32(1) - tail if x > 0 else tail


@compiled(**VECTOR)
def activate(line: Any, which: int) -> None:
    """Apply an activation of :data:`ACTIVATION_CODES` to every number of a float32 vector, in place."""
    if which == 1:
        for j in range(line.shape[0]):
            line[j] *= _normal(line[j])
    elif which == 2:
        for j in range(line.shape[0]):
            x = line[j]
            line[j] = x * _logistic(TANH * (x + np.float32(0.044715) * x * x * x))
    elif which == 3:
        for j in range(line.shape[0]):
            line[j] *= _logistic(line[j])
    elif which == 4:
        for j in range(line.shape[0]):
            line[j] = max(line[j], np.float32(0))
