"""The report in sentences, shared by the page and the Markdown summary."""

from __future__ import annotations

import re
import shlex
from typing import Literal

from reelquant._numbers import NOTHING, count, figure, percent
from reelquant.evidence.metrics import FEW
from reelquant.evidence.report.data import AttentionData, FailureData, GateData, ReportData

Tone = Literal["good", "bad", "unknown"]

BETTER = {
    "higher": ("\u2191", "higher is better"),
    "lower": ("\u2193", "lower is better"),
    "zero": ("\u2192 0", "near 0 is better"),
    "one": ("\u2192 1", "near 1 is better"),
}
WITHIN = {True: "within", False: "outside", None: NOTHING}
TITLES = {"evaluate": "Evaluation", "compare": "Comparison"}


def command(reason: str) -> tuple[str, str | None]:
    """A reason, and the command that it ends with if it ends with one.

    Example:
        >>> command("needs the weights 'i3d': reelquant weights i3d")
        ("needs the weights 'i3d'", 'reelquant weights i3d')
    """
    found = re.fullmatch(r"(.*?):\s*`?(reelquant [^`]+?)`?\.?", reason.strip(), re.DOTALL)
    return (found[1], found[2]) if found else (reason, None)


def sides(data: ReportData) -> tuple[str, str]:
    """What the two clips of a pair are called: by role for an evaluation, by name for a comparison."""
    if data.kind != "compare":
        return "float", "quantized"
    return data.reference.name or "reference", data.test.name or "test"


def headline(data: ReportData) -> str:
    """What is compared with what."""
    left = (data.test.name or "unnamed") + (f" ({data.test.recipe})" if data.test.recipe else "")
    right = " ".join(filter(None, [data.reference.name or "unnamed", data.reference.dtype]))
    return f"{left} against {right}"


def gate_verdict(data: ReportData) -> tuple[Tone, str]:
    """Whether the gate holds."""
    gate = data.gate
    if gate is None or gate.passed is None:
        return "unknown", "No gate was applied"
    preset = gate.preset or "unnamed"
    if gate.passed:
        return "good", f"Passes the gate '{preset}'"
    reasons = _reasons(data, gate)
    return "bad", f"Fails the gate '{preset}'" + (f": {', '.join(reasons)}" if reasons else "")


def _reasons(data: ReportData, gate: GateData) -> list[str]:
    """Why the gate failed: defects if any was recognised, else the metrics outside of their limits."""
    named = [name for failure in gate.failures for name in (failure.looks_like or "").split(", ") if name]
    return list(dict.fromkeys(map(defect_words, named))) or [data.title(failure.metric) for failure in gate.failures]


def defect_words(name: str) -> str:
    """The name of a defect for people.

    Example:
        >>> defect_words("constant_frame"), defect_words("black_frame")
        ('one-colour frame', 'black frame')
    """
    return name.replace("color", "colour").replace("constant", "one-colour").replace("_", " ")


def failure_line(data: ReportData, failure: FailureData) -> str:
    """One failure of the gate: its metric and what was found."""
    limit = failure.limit or "not recorded"
    return f"{data.title(failure.metric)}: {failure.sentence or f'{figure(failure.value)}, the limit is {limit}'}"


def near_lossless(data: ReportData) -> str | None:
    """What was measured about near-losslessness; None if the data do not say."""
    found = data.near_lossless
    if found is None:
        return None
    failed = ", ".join(data.title(name) for name in found.failed)
    said = {
        True: "Near-lossless: no further from float than float run differently (the noise floor)",
        False: "Not near-lossless" + (f": {failed} outside of the noise floor, which is float run differently" if failed else ""),
        None: "Near-lossless was not decided",
    }[found.holds]
    return f"{said} ({found.why.rstrip('.')})" if found.why and not failed else said


def arithmetic(data: ReportData) -> str | None:
    """How products are computed; None if the data do not say."""
    quantization = data.quantization
    if quantization is None or quantization.simulated is None:
        return None
    said = (
        "In some or all layers float arithmetic stood in for few-bit products (simulated): clips show the recipe's quality, not its speed"
        if quantization.simulated
        else "Every quantized layer was computed as the recipe says; nothing stood in for it"
    )
    return said if quantization.attention is None else f"{said}; {attended(quantization.attention)}"


def attended(attention: AttentionData) -> str:
    """How attention with few-bit operands is computed."""
    if attention.refused:
        return f"attention with {attention.asked} was asked for and not used: {attention.refused}"
    how = "float arithmetic stood in for it" if attention.simulated else f"computed so, by {attention.kernel}"
    return f"attention with {attention.asked}: {how}"


def floor_note(data: ReportData) -> str:
    """What the noise floor is here, a sentence for each float variant; empty without one."""
    return " ".join(f"{name}: {words.rstrip('.')}." for name, words in data.floor_words.items() if name in data.floors)


def few_clips(data: ReportData) -> str:
    """From how many clips distances of sets are a headline; empty if none was measured or there are enough."""
    names = [data.title(name) for name, metric in data.measured.items() if metric.kind == "distribution"]
    if not names or data.clip_count >= FEW:
        return ""
    clips = count(data.clip_count, "clip")
    return f"{', '.join(names)} of {clips} stand in the table only: distances of sets are a headline from {FEW} clips on."


def clipping(data: ReportData) -> str | None:
    """What was clipped while the clips were made; None if it was not counted."""
    found = data.saturation
    if found is None or found.share is None:
        return None
    if not found.share:
        return "No input left the calibrated ranges"
    return f"{percent(found.share)} of the rounded inputs were clipped, at {figure(found.excess)} times the noise of rounding"


def reuse(data: ReportData) -> str | None:
    """What was not computed at every step; None without reuse."""
    found = data.reuse
    if found is None or found.share is None:
        return None
    parts = found.parts[0] if len(found.parts) == 1 else f"{len(found.parts)} {found.things} ({found.parts[0]} to {found.parts[-1]})"
    return f"{percent(found.share)} of the {found.unit} of {parts} were computed; earlier results stood for the others"


def verdict(data: ReportData) -> tuple[Tone, list[str]]:
    """The tone of the whole report and its sentences, the first about the gate."""
    tone, first = gate_verdict(data)
    return tone, [f"{sentence}." for sentence in (first, near_lossless(data), arithmetic(data)) if sentence]


def reproduce(data: ReportData) -> str:
    """The command that measures this again: the recorded one, or its first words."""
    if data.command:
        return data.command
    test, reference = shlex.quote(data.test.name or "TEST"), shlex.quote(data.reference.name or "REFERENCE")
    if data.kind == "compare":
        return f"reelquant compare {test} {reference}"
    return f"reelquant evaluate {test} --reference {reference}"


def capitalised(words: str) -> str:
    """First letter large, a full stop at the end."""
    return words[:1].upper() + words[1:].rstrip(".") + "."
