"""Golden values of the number formats and scores, computed with numpy alone: no torch, and nothing of reelquant.

Written from the definitions (docs/design.md, OCP MX for the small floats, the docstrings of the criteria), with plain loops where the
library is vectorized, so that both agree only if both are right. Run it to write ``golden.json`` again:

    python tests/golden/make_golden.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
f32 = np.float32


def bf16(x: float) -> np.float32:
    """Nearest bfloat16, ties to even, by the bits."""
    bits = int(np.array(x, f32).view(np.uint32))
    return np.array(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16) & 0xFFFFFFFF, np.uint32).view(f32)[()]


# ---------------------------------------------------------------- integers


def symmetric(row: np.ndarray, bits: int, stored: Any = f32) -> tuple[f32, list[int], list[float]]:
    """Scale, signed integers and values of one unit: the range includes zero and reaches the further end.

    ``stored``: what the scale is rounded to before codes are chosen (one scale: float32; one per channel or group: bfloat16).
    """
    top, bottom = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    high, low = max(f32(0), row.max()), min(f32(0), row.min())
    scale = f32(stored(max(f32(high / f32(top)), f32(low / f32(bottom)))))
    if scale == 0:
        scale = f32(1)
    integers = [int(min(max(round(float(f32(v / scale))), bottom), top)) for v in row]
    return scale, integers, [float(f32(f32(i) * scale)) for i in integers]


def affine(row: np.ndarray, bits: int, stored: Any = f32) -> tuple[f32, int, list[int], list[float]]:
    """Scale, zero point, integers and values of one unit."""
    top = 2**bits - 1
    high, low = max(f32(0), row.max()), min(f32(0), row.min())
    scale = f32(stored(f32(f32(high / f32(top)) - f32(low / f32(top)))))
    zero = int(min(max(round(float(f32(-low / scale))), 0), top))
    integers = [int(min(max(round(float(f32(f32(v / scale) + f32(zero)))), 0), top)) for v in row]
    return scale, zero, integers, [float(f32(f32(i - zero) * scale)) for i in integers]


# ---------------------------------------------------------------- small floats


def small_float(value: float, exponent_bits: int, mantissa_bits: int, largest: float) -> float:
    """Round to nearest, ties to even, saturating; done by listing all numbers with their bit patterns."""
    bias = 2 ** (exponent_bits - 1) - 1
    numbers = []
    for pattern in range(2 ** (exponent_bits + mantissa_bits)):
        e, m = pattern >> mantissa_bits, pattern % 2**mantissa_bits
        number = m / 2**mantissa_bits * 2.0 ** (1 - bias) if e == 0 else (1 + m / 2**mantissa_bits) * 2.0 ** (e - bias)
        if number <= largest:
            numbers.append((number, pattern))
    magnitude = min(abs(value), largest)
    nearest = min(numbers, key=lambda pair: (abs(pair[0] - magnitude), pair[1] % 2))
    return math.copysign(nearest[0], value)


# ---------------------------------------------------------------- skewed levels


def log2_levels(bits: int, tau: int) -> list[float]:
    magnitudes = [2.0 ** (-q / tau) for q in range((2**bits - 1) // 2)]
    return sorted({0.0, *magnitudes, *(-m for m in magnitudes)})


def log_uniform_levels(bits: int, edge: float, tau: int) -> list[float]:
    half = 2 ** (bits - 1)
    small = [edge * 2.0 ** (-q / tau) for q in range((half - 1) // 2)]
    return sorted({0.0, *small, *(-s for s in small), *(edge + (1 - edge) * (i + 1) / half for i in range(half))})


def power_levels(bits: int, gamma: float, bottom: float) -> list[float]:
    return [bottom + (1 - bottom) * (i / (2**bits - 1)) ** gamma for i in range(2**bits)]


# ---------------------------------------------------------------- scores


def nmse(reference: np.ndarray, test: np.ndarray) -> float:
    return float(np.mean((test - reference) ** 2) / np.var(reference))


def tdscore(reference: np.ndarray, test: np.ndarray) -> float:
    """Definition, timestep by timestep."""
    steps = range(len(reference))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        size = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / size) if size else 0.0

    def points(features: np.ndarray, t: int) -> float:
        return cosine(features[t], reference[t]) - max(cosine(features[t], reference[o]) for o in steps if o != t)

    def apart(features: np.ndarray, t: int) -> float:
        return min(float(np.linalg.norm(features[t] - features[o])) for o in steps if o != t)

    def both_ways(value: float, wanted: float) -> float:
        ratio = value / wanted
        return min(ratio, 1 / ratio) if ratio > 0 else max(ratio, -1.0)

    parts = [both_ways(points(test, t), points(reference, t)) / 2 + both_ways(apart(test, t), apart(reference, t)) / 2 for t in steps]
    return sum(parts) / len(parts)


# ---------------------------------------------------------------- bits


def packed(row: list[int], bits: int) -> list[int]:
    """Little-endian: code i holds bits i * bits ... of one long number."""
    number = sum(code << (i * bits) for i, code in enumerate(row))
    return list(number.to_bytes(math.ceil(len(row) * bits / 8), "little"))


def make() -> dict[str, Any]:
    """All golden values."""
    weight = np.array(
        [[0.71, -0.33, 0.02, 1.91, -2.5, 0.49], [0.011, 0.047, -0.002, -0.031, 0.0, 0.008], [5.0, 3.25, 0.5, 1.125, 2.0, 4.4]], f32
    )
    padded = np.concatenate([weight, np.zeros((3, 2), f32)], 1)  # groups of 4: the second one is two short
    integers: dict[str, Any] = {"weight": weight.tolist()}
    for bits in (2, 4, 8):
        scale, codes, values = symmetric(weight.reshape(-1), bits)
        integers[f"int{bits} tensor"] = {"scale": [float(scale)], "integers": codes, "values": values}
        rows = [symmetric(row, bits, bf16) for row in weight]
        integers[f"int{bits} channel"] = {
            "scale": [float(r[0]) for r in rows],
            "integers": [i for r in rows for i in r[1]],
            "values": [v for r in rows for v in r[2]],
        }
        groups = [symmetric(row[start : start + 4], bits, bf16) for row in padded for start in (0, 4)]
        integers[f"int{bits} group-4"] = {
            "scale": [float(g[0]) for g in groups],
            "integers": [i for n, g in enumerate(groups) for i in g[1][: 2 if n % 2 else 4]],
            "values": [v for n, g in enumerate(groups) for v in g[2][: 2 if n % 2 else 4]],
        }
        for name, units, stored in (("tensor", [weight.reshape(-1)], f32), ("channel", list(weight), bf16)):
            found = [affine(unit, bits, stored) for unit in units]
            integers[f"uint{bits} {name}"] = {
                "scale": [float(u[0]) for u in found],
                "zero_point": [u[1] for u in found],
                "integers": [i for u in found for i in u[2]],
                "values": [v for u in found for v in u[3]],
            }

    points = [0.0, 1e-4, 0.001, 0.0146484375, 0.24, 0.25, 0.75, 1.0, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, 6.0, 7.0, 17.0, 18.0, 19.0, 100.0]
    points += [232.0, 240.0, 447.0, 464.0, 1000.0, 57000.0, 60000.0, 1e-5, 7.6e-6, 0.0009765625, 0.0029296875]
    points = [float(f32(p)) for p in points]
    points += [-p for p in points[1:]]
    floats = {"points": points}
    for name, e, m, largest in (("e4m3", 4, 3, 448.0), ("e5m2", 5, 2, 57344.0), ("e2m1", 2, 1, 6.0)):
        floats[name] = [small_float(p, e, m, largest) for p in points]

    levels = {
        "log2": [{"bits": b, "tau": t, "levels": log2_levels(b, t)} for b, t in ((2, 1), (3, 1), (4, 2), (5, 8))],
        "log_uniform": [
            {"bits": b, "edge": e, "tau": t, "levels": log_uniform_levels(b, e, t)}
            for b, e, t in ((3, 0.25, 1), (4, 0.125, 2), (6, 0.3, 4))
        ],
        "power": [
            {"bits": b, "gamma": g, "bottom": m, "levels": power_levels(b, g, m)}
            for b, g, m in ((2, 2.0, -0.5), (4, 1.5, -0.06), (6, 3.0, 0.0))
        ],
    }

    time = np.linspace(0.0, 1.0, 7)[:, None]
    features = np.sin(time * np.array([1.0, 2.0, 3.5, 5.0, 8.0])) + np.array([0.1, -0.2, 0.0, 0.4, 0.3])
    tests = {
        "lossless": features,
        "rounded to 1/8": np.round(features * 8) / 8,
        "rounded to 1/2": np.round(features * 2) / 2,
        "last two swapped": features[[0, 1, 2, 3, 4, 6, 5]],
        "last two merged": features[[0, 1, 2, 3, 4, 5, 5]],
        "pushed apart": features * 1.5 - 0.2,
    }
    scores = {
        "features": features.tolist(),
        "tests": {name: {"values": t.tolist(), "tdscore": tdscore(features, t), "nmse": nmse(features, t)} for name, t in tests.items()},
    }

    rows = [[(5 * i * i + 3 * r + i) % 256 for i in range(11)] for r in range(2)]
    bits = {
        str(b): {"codes": [[c % 2**b for c in r] for r in rows], "bytes": [packed([c % 2**b for c in r], b) for r in rows]}
        for b in range(2, 9)
    }
    return {"integers": integers, "floats": floats, "levels": levels, "scores": scores, "packing": bits}


def text() -> str:
    """The stored form: one entry a line where that is readable."""
    return json.dumps(make(), indent=1) + "\n"


if __name__ == "__main__":
    (HERE / "golden.json").write_text(text())
    print(f"wrote {HERE / 'golden.json'}")
