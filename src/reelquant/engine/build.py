"""One group of layers that share an input -> their quantized replacements. Nothing in the model changes here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant.engine.choice import Choice
from reelquant.engine.pack import packed
from reelquant.engine.plan import LayerPlan, Plan
from reelquant.engine.quality import LayerRecord, record_of
from reelquant.formats import Quantizer, fit
from reelquant.nn import SHIFT_DTYPE, QuantLayer, get_module
from reelquant.observe import ChannelRange, InputStatistics
from reelquant.recipes.entry import Entry
from reelquant.sites import Group
from reelquant.solvers import Nearest
from reelquant.stages import GroupView, LayerWork, Rewrite, bound, follows, nearest_seen

LayerOf = Callable[[str], nn.Module]
COMPARED = 256  # rows that are compared with each other, at most: as many as a run has different timesteps, by far


@dataclass(frozen=True, eq=False)
class Context:
    """What building layers takes, beside the layers.

    Attributes:
        plan: the table.
        denoiser: the float model.
        inputs: statistics by layer name; empty for data-free recipes.
        timesteps: of calibration (slots of per-step scales).
        layer_of: gives a float layer with its tensors in memory.
        draft: round weights to nearest, whatever the recipe's solver is.
        folding: whether rewrites may move into norms.
    """

    plan: Plan
    denoiser: nn.Module
    inputs: Mapping[str, InputStatistics]
    timesteps: Sequence[float]
    layer_of: LayerOf
    draft: bool = False
    folding: bool = True


@dataclass(frozen=True, eq=False)
class Built:
    """One quantized layer, what it was made of, and what the report says (None for drafts)."""

    layer: QuantLayer
    work: LayerWork
    record: LayerRecord | None


@dataclass(eq=False)
class BuiltGroup:
    """Replacements for one group.

    Attributes:
        layers: quantized layers by name.
        fold: the rewrite that moves into the producing norm, or None.
        records: one per layer.
        works: what the layers were made of, by name, if that was asked for.
    """

    group: Group
    layers: dict[str, QuantLayer]
    fold: Rewrite | None
    records: list[LayerRecord]
    works: dict[str, LayerWork] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class GroupWork:
    """What the layers of a group share while they are built.

    Attributes:
        rows: the layers to build.
        outside: the part of their input's rewrite that moves into the producing norm.
        inside: the rest, which each layer does itself.
    """

    rows: list[LayerPlan]
    outside: Rewrite = field(default_factory=Rewrite)
    inside: Rewrite = field(default_factory=Rewrite)

    @property
    def fold(self) -> Rewrite | None:
        """The rewrite that moves into the producing norm, or None."""
        return None if self.outside.identity else self.outside


def build_group(context: Context, group: Group, choice: Choice, *, keep_works: bool = False) -> BuiltGroup:
    """Rewrite, solve and pack every quantized layer of a group; skipped ones are left alone."""
    shared = prepare_group(context, group, choice)
    built = BuiltGroup(group, {}, shared.fold, [])
    for row in shared.rows:
        one = build_layer(context, shared, row, choice)
        built.layers[row.layer.name] = one.layer
        built.records += [one.record] if one.record else []
        if keep_works:
            built.works[row.layer.name] = one.work
    return built


def prepare_group(context: Context, group: Group, choice: Choice) -> GroupWork:
    """The rewrite of a group's input. Float layers are let go again."""
    plan = context.plan
    rows = [plan.layers[name] for name in group.layers if plan.layers[name].skipped is None]
    rewrite = _rewrite(context, rows, choice, group.seam)
    outside, inside = Rewrite(), rewrite
    first, rest = rewrite.first()
    whole = len(rows) == len(group.layers) and not first.identity and context.folding
    if whole and _folds(group, context.denoiser, first):
        outside, inside = first, rest
    return GroupWork(rows, outside, inside.stored(SHIFT_DTYPE))


def shared_rewrites(rows: Sequence[LayerPlan]) -> list[Entry]:
    """The stages that rewrite an input which these layers share: those that touch all of them."""
    entries = rows[0].entries if rows else ()
    return [entry for entry in entries if entry.acts("rewrite") and all(entry in row.entries for row in rows)]


def _rewrite(context: Context, rows: Sequence[LayerPlan], choice: Choice, seam: int | None) -> Rewrite:
    """All rewrites that apply to every layer of the group, in recipe order."""
    entries = shared_rewrites(rows)
    observed = bool(rows) and rows[0].layer.name in context.inputs
    if not entries or not (observed or context.plan.recipe.data_free):
        return Rewrite()
    view = replace(_view(context, rows) if observed else _unseen(context, rows), seam=seam)
    for entry in entries:
        view = choice.stage(entry).rewrite(view)
    return view.total


def _unseen(context: Context, rows: Sequence[LayerPlan]) -> GroupView:
    """The view of a recipe without calibration: nothing is known of the input. No stage that needs data is in such a recipe."""
    weights = [_weight(context.layer_of(row.layer.name)) for row in rows]
    nothing = weights[0].new_zeros(1, weights[0].shape[1])
    sites = tuple(row.site for row in rows)
    return GroupView(nothing, nothing, nothing, weights, rounded=any(row.input for row in rows), sites=sites)


def _view(context: Context, rows: Sequence[LayerPlan]) -> GroupView:
    seen, unseen = context.inputs[rows[0].layer.name], context.plan.unseen
    ranges = [None if one is None else _reach(one, unseen=unseen) for one in (seen.range, seen.rotated)]
    assert ranges[0] is not None
    weights = [_weight(context.layer_of(row.layer.name)) for row in rows]
    rounded = any(row.input for row in rows)
    sites = tuple(row.site for row in rows)
    rows_seen = None if seen.rows is None else seen.rows.rows.to(weights[0].device)
    return GroupView(*ranges[0], weights, ranges[1], rounded, sites=sites, statistics=seen, rows=rows_seen, unseen=unseen)


def _reach(seen: ChannelRange, *, unseen: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest and highest value of every channel ``[1, channels]``, and the means ``[steps, channels]``."""
    low, high = seen.envelope(unseen=unseen)
    return low.amin(1), high.amax(1), seen.mean.mean(1)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()


def folded(norm: Mapping[str, Tensor], rewrite: Rewrite) -> dict[str, Tensor]:
    """Parameters of an affine norm that took a rewrite over: ``gamma / s``, ``(beta - z) / s``, in the dtypes they have."""
    scale = torch.ones(()) if rewrite.scale is None else rewrite.scale
    parameters = {"weight": norm["weight"].float() / scale}
    if "bias" in norm:
        shift = 0 if rewrite.shift is None else rewrite.shift
        parameters["bias"] = (norm["bias"].float() - shift) / scale
    return {name: value.to(norm[name].dtype) for name, value in parameters.items()}


def _folds(group: Group, denoiser: nn.Module, rewrite: Rewrite) -> bool:
    """Can the rewrite move into the producing norm without loss? A norm in half precision would round it."""
    if not group.foldable or group.producer is None:
        return False
    if rewrite.shift is not None and not group.fold_shift:
        return False
    return all(p.dtype == torch.float32 for p in get_module(denoiser, group.producer).parameters(recurse=False))


def build_layer(context: Context, shared: GroupWork, row: LayerPlan, choice: Choice) -> Built:
    """One quantized layer of a group."""
    module = context.layer_of(row.layer.name)
    work = _start(context, shared, row, module)
    for hook in ("split", "solve_layer"):
        for entry in row.entries:
            if entry.acts(hook):
                stage = choice.stage(entry)
                work = getattr(stage.draft() if context.draft else stage, hook)(work)
    return finish_layer(shared, row, work, choice, module, draft=context.draft)


def finish_layer(shared: GroupWork, row: LayerPlan, work: LayerWork, choice: Choice, module: nn.Module, *, draft: bool = False) -> Built:
    """Pack a layer that has codes; rounding to nearest gives it some if no stage did."""
    work = work if work.solution is not None else Nearest(correct_bias=work.correct_bias).solve_layer(work)
    assert work.solution is not None
    work = replace(work, stored_bias=work.bias_for(work.solution.values))
    layer = packed(row, work, module)
    return Built(layer, work, None if draft else record_of(row, work, choice, layer, folded=shared.fold is not None))


def _start(context: Context, shared: GroupWork, row: LayerPlan, module: nn.Module) -> LayerWork:
    """The layer before any stage worked on it, its input ranged already."""
    weight, seen = _weight(module), context.inputs.get(row.layer.name)
    work = LayerWork(
        site=row.site,
        weight=weight,
        target=shared.inside.weight(shared.outside.weight(weight)),
        bias=None if module.bias is None else module.bias.detach().float(),
        inside=shared.inside,
        outside=shared.outside,
        statistics=seen,
        timesteps=context.timesteps,
        unseen=context.plan.unseen,
    )
    return replace(work, inputs=_input_quantizers(work))


def _input_quantizers(work: LayerWork) -> list[Quantizer] | None:
    """One quantizer per slot, or None if the input stays float or its range is found at run time."""
    spec, seen = work.site.specs.input, work.statistics
    if spec is None or spec.dynamic or seen is None:
        return None
    features = seen.features
    fixed = features is not None and not features.varies and spec.slots == "shared" and spec.granularity.kind != "frame"
    if fixed:
        return [fit(spec, work.rewrite.input(features.features))]
    if spec.range.needs_samples or spec.alternatives or follows(work.rewrite, seen) is None:
        return _from_samples(work, seen)
    return bound(spec, work.rewrite, seen, unseen=work.unseen, steps=len(work.timesteps))


def _from_samples(work: LayerWork, seen: InputStatistics) -> list[Quantizer]:
    """Quantizers from sampled rows of the rewritten input: one, or one per step from the rows of that step.

    A step without rows has the quantizer of the nearest step that has some.
    """
    spec = work.site.specs.input
    assert spec is not None
    if seen.rows is None or spec.granularity.kind != "tensor":
        raise UnsupportedError(
            f"ranges from samples (of rules that compare values, of rotations after other rewrites) work per tensor, got {spec} for "
            f"'{work.site.layer.name}'"
        )
    rewrite, rows = work.rewrite.per_tap(work.taps), seen.rows.rows.to(work.weight.device)
    if spec.slots == "shared":
        return [fit(spec, rewrite.input(distinct(rows) if spec.range.joint else rows))]
    steps = seen.rows.steps.to(rows.device)
    sampled = steps.unique().tolist()  # in ascending order
    found = [fit(spec, rewrite.input(rows[steps == step])) for step in sampled]
    return [found[place] for place in nearest_seen(sampled, len(work.timesteps))]


def distinct(rows: Tensor) -> Tensor:
    """Rows ``[rows, channels]`` that differ, :data:`COMPARED` at most, evenly from their sorted order.

    Rules that compare every row with every other one ask how far timesteps lie apart. Where each token has a timestep of its own, samples
    hold few different rows many times over: equal rows have no distance, and thousands of them take hours.
    """
    found = rows.unique(dim=0)
    return found if len(found) <= COMPARED else found[torch.linspace(0, len(found) - 1, COMPARED).round().long().to(found.device)]
