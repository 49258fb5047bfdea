"""The report in words: the sentences that the page and the Markdown summary share, and the summary itself."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeGuard

from reelquant.evidence.metrics import METRICS

Data = Mapping[str, Any]
Tone = Literal["good", "bad", "unknown"]

NOTHING = "\u2013"
MINUS = "\u2212"
KINDS = {
    "paired": "Clip against clip",
    "temporal": "Motion over time",
    "distribution": "Set of clips against set of clips",
    "text": "Clip against its text",
}
BETTER = {
    "higher": ("\u2191", "higher is better"),
    "lower": ("\u2193", "lower is better"),
    "zero": ("\u2192 0", "near 0 is better"),
    "one": ("\u2192 1", "near 1 is better"),
}
WITHIN = {True: "within", False: "outside", None: NOTHING}
TITLES = {"evaluate": "Evaluation", "compare": "Comparison"}


# ------------------------------------------------------------------------------------------------------------------- numbers


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite number; booleans, None, NaN and infinities are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def figure(value: Any, unit: str = "", digits: int | None = None) -> str:
    """A number for people: three significant digits, or ``digits`` decimals; a dash for anything that is no finite number.

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


def decimals(metric: Data) -> int | None:
    """Decimals for all figures of a row: two digits of the interval's width, or as many as the value needs."""
    value, low, high = (metric.get(key) for key in ("value", "low", "high"))
    if is_number(low) and is_number(high) and high > low:
        return min(6, max(0, 1 - math.floor(math.log10(high - low))))
    return min(6, significant(value)) if is_number(value) else None


def interval(metric: Data, unit: str = "", digits: int | None = None) -> str:
    """``52.1 dB (51.0 to 53.2)``; without an interval only the value."""
    value = figure(metric.get("value"), unit, digits)
    low, high = metric.get("low"), metric.get("high")
    return f"{value} ({figure(low, '', digits)} to {figure(high, '', digits)})" if is_number(low) and is_number(high) else value


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


# ------------------------------------------------------------------------------------------------------------------- metrics


def metrics_of(data: Data) -> dict[str, Data]:
    """The metrics by kind and, within one, in the order of :data:`~reelquant.evidence.metrics.METRICS`; others follow by name."""
    known = {name: i for i, name in enumerate(METRICS)}
    kinds = {kind: i for i, kind in enumerate(KINDS)}
    found = {name: metric for name, metric in (data.get("metrics") or {}).items() if metric}
    return {
        name: found[name]
        for name in sorted(found, key=lambda name: (kinds.get(found[name].get("kind"), len(kinds)), known.get(name, len(known)), name))
    }


def measured(data: Data) -> dict[str, Data]:
    """The metrics that have a value."""
    return {name: metric for name, metric in metrics_of(data).items() if is_number(metric.get("value"))}


def missing(data: Data) -> dict[str, list[str]]:
    """Reason -> titles of the metrics without a value."""
    found: dict[str, list[str]] = {}
    for name, metric in metrics_of(data).items():
        if not is_number(metric.get("value")):
            found.setdefault(metric.get("missing") or "no value was recorded and no reason given", []).append(title(name, metric))
    return found


def title(name: str, metric: Data | None = None) -> str:
    """What tables call a metric."""
    known = METRICS[name].title if name in METRICS else name
    return (metric or {}).get("title") or known


def floors_of(data: Data) -> list[str]:
    """Names of the float variants that every figure is held against, in the order they first appear."""
    return list(dict.fromkeys(floor for metric in metrics_of(data).values() for floor in metric.get("floor") or {}))


def command(reason: str) -> tuple[str, str | None]:
    """A reason, and the command that it ends with if it ends with one.

    Example:
        >>> command("needs the weights 'i3d': reelquant weights i3d")
        ("needs the weights 'i3d'", 'reelquant weights i3d')
    """
    found = re.fullmatch(r"(.*?):\s*`?(reelquant [^`]+?)`?\.?", reason.strip(), re.DOTALL)
    return (found[1], found[2]) if found else (reason, None)


# ------------------------------------------------------------------------------------------------------------------ sentences


def sides(data: Data) -> tuple[str, str]:
    """What the two clips of a pair are called: by role for an evaluation, by name for a comparison."""
    if data.get("kind") != "compare":
        return "float", "quantized"
    reference, test = ((data.get(key) or {}).get("name") for key in ("reference", "test"))
    return reference or "reference", test or "test"


def headline(data: Data) -> str:
    """What is compared with what."""
    reference, test = data.get("reference") or {}, data.get("test") or {}
    left = (test.get("name") or "unnamed") + (f" ({test['recipe']})" if test.get("recipe") else "")
    right = " ".join(filter(None, [reference.get("name") or "unnamed", reference.get("dtype")]))
    return f"{left} against {right}"


def gate_verdict(data: Data) -> tuple[Tone, str]:
    """Whether the gate holds."""
    gate = data.get("gate")
    if not gate or gate.get("passed") is None:
        return "unknown", "No gate was applied"
    preset = gate.get("preset") or "unnamed"
    if gate["passed"]:
        return "good", f"Passes the gate '{preset}'"
    failures = gate.get("failures") or []
    looks = list(dict.fromkeys(failure.get("looks_like") for failure in failures if failure.get("looks_like")))
    metrics = data.get("metrics") or {}
    names = [title(failure.get("metric") or "unknown", metrics.get(failure.get("metric"))) for failure in failures]
    return "bad", f"Fails the gate '{preset}'" + (f": {', '.join(looks or names)}" if looks or names else "")


def near_lossless(data: Data) -> str | None:
    """What was measured about near-losslessness; None if nothing was said about it."""
    found = data.get("near_lossless")
    if not found:
        return None
    metrics = data.get("metrics") or {}
    failed = ", ".join(title(name, metrics.get(name)) for name in found.get("failed") or [])
    said = {
        True: "Near-lossless: no further from float than float is from itself",
        False: f"Not near-lossless{': ' + failed + ' outside of the float floor' if failed else ''}",
        None: "Near-lossless was not decided",
    }[found.get("holds")]
    return f"{said} ({found['why'].rstrip('.')})" if found.get("why") and not failed else said


def arithmetic(data: Data) -> str | None:
    """How products are computed; None if the data do not say."""
    quantization = data.get("quantization") or {}
    if quantization.get("simulated") is None:
        return None
    kernels = ", ".join(f"{name} in {count(layers, 'layer')}" for name, layers in (quantization.get("kernel") or {}).items())
    said = (
        "Simulated arithmetic: codes are stored, products are computed in float"
        if quantization["simulated"]
        else "Real low-bit arithmetic in every quantized layer"
    )
    said = f"{said} (kernel {kernels})" if kernels else said
    attention = quantization.get("attention")
    return said if attention is None else f"{said}; {attended(attention)}"


def attended(attention: Data) -> str:
    """How attention with few-bit operands is computed."""
    if attention.get("refused"):
        return f"attention with {attention['asked']} was asked for and not used: {attention['refused']}"
    honest = "simulated in float" if attention.get("simulated") else "real"
    return f"attention with {attention['asked']}, {honest} (kernel {attention['kernel']})"


def verdict(data: Data) -> tuple[Tone, list[str]]:
    """The tone of the whole report and its sentences, the first about the gate."""
    tone, first = gate_verdict(data)
    return tone, [f"{sentence}." for sentence in (first, near_lossless(data), arithmetic(data)) if sentence]


def reproduce(data: Data) -> str:
    """The command that measures this again: the recorded one, or its first words."""
    if data.get("command"):
        return str(data["command"])
    test, reference = (shlex.quote(str((data.get(key) or {}).get("name") or key.upper())) for key in ("test", "reference"))
    if data.get("kind") == "compare":
        return f"reelquant compare {reference} {test}"
    return f"reelquant evaluate {test} --reference {reference}"


# -------------------------------------------------------------------------------------------------------------------- summary


def escaped(text: Any) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(str(text).split()))


def metric_row(name: str, metric: Data, floors: list[str]) -> str:
    """One row of the summary's table."""
    digits, unit = decimals(metric), metric.get("unit") or ""
    arrow = BETTER.get(metric.get("better") or "", ("", ""))[0]
    found = metric.get("floor") or {}
    cells = [f"{escaped(title(name, metric))} {arrow}".strip(), figure(metric.get("reference"), "", digits), interval(metric, unit, digits)]
    cells += [interval(found.get(floor) or {}, "", digits) for floor in floors]
    return f"| {' | '.join([*cells, WITHIN[metric.get('within_floor')]])} |"


def metric_table(data: Data) -> list[str]:
    """Lines of the summary's table."""
    rows, floors = measured(data), floors_of(data)
    if not rows:
        return ["No metric was measured."]
    left, right = sides(data)
    heads = ["Metric", escaped(left), escaped(right), *(f"floor: {escaped(floor)}" for floor in floors), "floor"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' + '---:|' * (len(heads) - 2) + ':---:|'}"]
    return lines + [metric_row(name, metric, floors) for name, metric in rows.items()]


def quantization_line(quantization: Data) -> str:
    """The proof in one line."""
    layers, kept = quantization.get("layers") or [], sum(len(names) for names in (quantization.get("kept") or {}).values())
    before, after = quantization.get("bytes_float"), quantization.get("bytes_quantized")
    return (
        f"Recipe `{quantization.get('recipe')}` ({quantization.get('digest')}): {count(len(layers), 'layer')} quantized, {kept} float; "
        f"{size(before)} \u2192 {size(after)} ({figure(quantization.get('ratio'))}x smaller)."
    )


def environment_line(data: Data) -> str:
    """Where and with what it was measured."""
    machine, versions = data.get("machine") or {}, {"reelquant": data.get("tool_version"), **(data.get("versions") or {})}
    parts = [machine.get("gpu") or machine.get("cpu"), machine.get("os"), *(f"{name} {text}" for name, text in versions.items() if text)]
    return ", ".join(escaped(part) for part in parts if part)


def gate_line(failure: Data, data: Data) -> str:
    """One failure of the gate: its metric and what was found."""
    name = failure.get("metric") or "unknown"
    said = failure.get("sentence") or f"{figure(failure.get('value'))}, the limit is {failure.get('limit') or 'not recorded'}"
    return f"{title(name, (data.get('metrics') or {}).get(name))}: {said}"


def summary(data: Data) -> str:
    """A short Markdown text to paste into a pull request.

    Args:
        data: the content of ``report.json``, see ``docs/report.md``; every field may be absent.
    """
    tone, sentences = verdict(data)
    mark = {"good": "\u2705", "bad": "\u274c", "unknown": "\u2754"}[tone]
    clips = data.get("clips")
    lines = [f"### {mark} {escaped(headline(data))}", "", f"{escaped(' '.join(sentences))}", "", *metric_table(data), ""]
    if is_number(clips):
        intervals = "; intervals are 95 % over clips" if any(is_number(metric.get("low")) for metric in measured(data).values()) else ""
        lines += [f"{count(int(clips or 0), 'clip')}{intervals}.", ""]
    sections = {
        "Gate": [gate_line(failure, data) for failure in (data.get("gate") or {}).get("failures") or []],
        "Seen": [f"{x.get('name')} in {count(len(x.get('clips') or []), 'clip')}: {x.get('sentence')}" for x in data.get("defects") or []],
        "Not measured": [f"{', '.join(titles)}: {reason}" for reason, titles in missing(data).items()],
        "Warnings": list(data.get("warnings") or []),
    }
    for name, items in sections.items():
        if items:
            lines += [f"**{name}**", "", *(f"- {escaped(item)}" for item in items), ""]
    if data.get("quantization"):
        lines += [quantization_line(data["quantization"]), ""]
    environment = environment_line(data)
    lines += [f"<sub>{environment}</sub>"] if environment else []
    return "\n".join(lines).rstrip() + "\n"
