"""Why numbers cannot be computed for a layer, whatever its stages are."""

from __future__ import annotations

from reelquant.formats import FOUND_AT_RUN_TIME, QuantSpec
from reelquant.sites import Layer


def weight_problem(spec: QuantSpec) -> str | None:
    """Why a weight cannot have these numbers, or None."""
    if spec.granularity.kind in (*FOUND_AT_RUN_TIME, "frame"):
        return f"a weight has no {spec.granularity.kind}s; use tensor, channel or group-n"
    if spec.dynamic or spec.slots != "shared":
        return "a weight is the same at every step and in every call; drop 'dynamic' and 'slots'"
    return None


def input_problem(spec: QuantSpec, layer: Layer) -> str | None:
    """Why an input cannot have these numbers, or None."""
    kind, sampled = spec.granularity.kind, spec.range.needs_samples or bool(spec.alternatives)
    if kind in (*FOUND_AT_RUN_TIME, "group") and not spec.dynamic:
        return f"scales per {kind} of an input are found at run time; add dynamic: true"
    if spec.dynamic and spec.slots != "shared":
        return "dynamic scales follow every call by themselves; drop 'slots'"
    if spec.dynamic and (spec.alternatives or spec.range != type(spec.range)()):
        return "a range that is found at run time takes one format and the rule's own parameters, as a checkpoint keeps its name alone"
    if sampled and not spec.dynamic and (kind == "frame" or (kind == "channel" and layer.role != "temporal")):
        return f"a choice of formats and range rules that look at samples work per tensor, got {spec}; use range: minmax"
    if spec.slots != "shared" and (spec.alternatives or spec.range.joint):
        return f"a choice of formats, and a rule that compares steps, look at all steps at once, got {spec}; drop 'slots'"
    if spec.slots != "shared" and sampled and kind != "tensor":
        return f"range rules that look at samples work per tensor where each step has its scales, got {spec}; use range: minmax"
    return None
