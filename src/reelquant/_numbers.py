"""Numbers as text: figures, byte counts, ranges. Knows nothing of what they are about."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

NOTHING = "\u2013"
MINUS = "\u2212"


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite number; False for booleans, None, NaN and infinities."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def finite_only(value: Any) -> Any:
    """The data with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): finite_only(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_only(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figure(value: Any, unit: str = "", digits: int | None = None) -> str:
    """A number for people: three significant digits, or ``digits`` decimals; a dash for anything but a finite number.

    Example:
        >>> figure(52.134, "dB"), figure(0.99312), figure(0.000123), figure(12345)
        ('52.1 dB', '0.993', '0.00012', '12,345')
    """
    if not is_number(value):
        return NOTHING
    decimals = significant(value) if digits is None else digits
    text = f"{value:,.{decimals}f}" if decimals <= 6 else f"{value:.1e}"
    if not float(text.replace(",", "")):
        text = text.lstrip("-")  # a rounded figure has no negative zero
    text = text.replace("-", MINUS, 1) if "e" not in text else text
    return f"{text} {unit}".strip()


def significant(value: float) -> int:
    """Decimals that leave three significant digits, two below 0.01."""
    if not value:
        return 0
    exponent = math.floor(math.log10(abs(value)))
    return max(0, (2 if exponent >= -2 else 1) - exponent)


def percent(share: Any) -> str:
    """A share for people.

    Example:
        >>> percent(0.0123), percent(0.0000071)
        ('1.23 %', '0.00071 %')
    """
    return figure(100 * share, "%") if is_number(share) else NOTHING


def size(count: Any) -> str:
    """Bytes for people.

    Example:
        >>> size(15_501_312)
        '15.5 MB'
    """
    if not is_number(count):
        return NOTHING
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{int(count)} bytes"


def count(number: int, one: str, many: str | None = None) -> str:
    """``1 clip``, ``2 clips``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in short form.

    Example:
        >>> ranges([50000, 50001, 50002, 7])
        '7, 50000\u201350002'
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}\u2013{high}" for low, high in runs)


def plain(value: Any) -> str:
    """Nested data on one line, without quotes and outer brackets."""
    if isinstance(value, Mapping):
        return ", ".join(_pair(key, item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _pair(key: str, item: Any) -> str:
    return f"{key} ({plain(item)})" if isinstance(item, Mapping) else f"{key}: {plain(item)}"


def duration(seconds: float) -> str:
    """Seconds with a fitting unit.

    Example:
        >>> duration(40), duration(185), duration(9000)
        ('40 s', '3.1 min', '2.5 h')
    """
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{max(seconds, 1):.0f} s"
