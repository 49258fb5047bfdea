"""One group of layers that share an input -> their quantized replacements. Nothing in the model changes here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._errors import CalibrationError, UnsupportedError
from reelquant.formats import LEVEL_DTYPE, Quantizer, QuantSpec, bind, dynamic, fit, pack
from reelquant.formats.criteria import coverage, nmse, retrieval_accuracy, tdscore
from reelquant.nn import SHIFT_DTYPE, LayerLayout, LayerTensors, QuantLayer, TensorLayout, get_module, quantized_class
from reelquant.observe import ChannelRange, InputStatistics
from reelquant.recipes.plan import LayerPlan, Plan
from reelquant.recipes.recipe import Step
from reelquant.sites import Group
from reelquant.solvers import Nearest, Problem, Solution, Solver, solve
from reelquant.transforms import GroupView, Rewrite, Transform

Options = Mapping[int, dict[str, Any]]  # step number -> chosen parameters


@dataclass(frozen=True)
class LayerRecord:
    """What the report says about one quantized layer.

    Attributes:
        error: mean squared output error over the output's variance, on sampled inputs; None for data-free recipes.
        coverage: distinct input codes a channel uses over all codes, mean over channels.
        tdscore, retrieval, skewness: of the input features of temporal layers.
        solver: the solver that chose the codes; ``replaced`` names one that lost to it.
    """

    name: str
    role: str
    weight: str
    input: str
    bytes_before: int
    bytes_after: int
    error: float | None = None
    coverage: float | None = None
    tdscore: float | None = None
    retrieval: float | None = None
    skewness: float | None = None
    folded: bool = False
    solver: str = "nearest"
    replaced: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class BuiltGroup:
    """Replacements for one group.

    Attributes:
        layers: quantized layers by name.
        fold: the rewrite that moves into the producing norm, or None.
        records: one per layer.
    """

    group: Group
    layers: dict[str, QuantLayer]
    fold: Rewrite | None
    records: list[LayerRecord]


def build_group(
    plan: Plan, group: Group, denoiser: nn.Module, inputs: Mapping[str, InputStatistics], options: Options, timesteps: Sequence[float],
    *, draft: bool = False,
) -> BuiltGroup:  # fmt: skip
    """Transform, solve and pack every quantized layer of a group.

    Args:
        plan: the table.
        group: which layers; those the plan keeps are left alone.
        denoiser: the float model.
        inputs: statistics by layer name; empty for data-free recipes.
        options: parameters chosen for each step.
        timesteps: calibrated timesteps (slots of per-step scales).
        draft: round weights to nearest, whatever the recipe's solver is.
    """
    work = prepare_group(plan, group, denoiser, lambda name: get_module(denoiser, name), inputs, options)
    built = BuiltGroup(group, {}, work.fold, [])
    for row in work.rows:
        layer, record = build_layer(plan, work, row, get_module(denoiser, row.layer.name), inputs, options, timesteps, draft=draft)
        built.layers[row.layer.name] = layer
        built.records += [record] if record else []
    return built


@dataclass(frozen=True, eq=False)
class GroupWork:
    """What the layers of a group share while they are built.

    Attributes:
        rows: the layers to build.
        rewrite: of their input.
        folds: whether the rewrite moves into the producing norm.
    """

    rows: list[LayerPlan]
    rewrite: Rewrite
    folds: bool

    @property
    def fold(self) -> Rewrite | None:
        """The rewrite that moves into the producing norm, or None."""
        return self.rewrite if self.folds else None


def prepare_group(
    plan: Plan, group: Group, denoiser: nn.Module, layer_of: Callable[[str], nn.Module], inputs: Mapping[str, InputStatistics],
    options: Options,
) -> GroupWork:  # fmt: skip
    """The rewrite of a group's input. ``layer_of`` gives the float layers, whose weights need not be in memory before; they are let go."""
    rows = [plan.layers[name] for name in group.layers if plan.layers[name].kept is None]
    rewrite = _rewrite(plan, rows, layer_of, inputs, options)
    folds = len(rows) == len(group.layers) and not rewrite.identity and _folds(group, denoiser, rewrite)
    return GroupWork(rows, rewrite if folds else rewrite.stored(SHIFT_DTYPE), folds)


def build_layer(
    plan: Plan, work: GroupWork, row: LayerPlan, module: nn.Module, inputs: Mapping[str, InputStatistics], options: Options,
    timesteps: Sequence[float], *, draft: bool = False,
) -> tuple[QuantLayer, LayerRecord | None]:  # fmt: skip
    """One quantized layer of a group and, unless it is a draft, what the report says about it."""
    step, solver = _solver(plan, row, options)
    statistics = inputs.get(row.layer.name)
    made = _make_layer(plan, row, module, work.rewrite, work.folds, statistics, timesteps, step, Nearest() if draft else solver)
    if draft:
        return made.layer, None
    return made.layer, _record(plan, row, module, made, work.rewrite, work.folds, statistics, solver, options)


def folded(norm: Mapping[str, Tensor], rewrite: Rewrite) -> dict[str, Tensor]:
    """Parameters of an affine norm that took a rewrite over: ``gamma / s``, ``(beta - z) / s``, in the dtypes they have."""
    scale = torch.ones(()) if rewrite.scale is None else rewrite.scale
    moved = {"weight": norm["weight"].float() / scale}
    if "bias" in norm:
        shift = 0 if rewrite.shift is None else rewrite.shift
        moved["bias"] = (norm["bias"].float() - shift) / scale
    return {name: value.to(norm[name].dtype) for name, value in moved.items()}


def _folds(group: Group, denoiser: nn.Module, rewrite: Rewrite) -> bool:
    """Can the rewrite move into the producing norm without loss? A norm in half precision would round it."""
    if not group.foldable or group.producer is None or rewrite.rotated or (rewrite.shift is not None and not group.fold_shift):
        return False
    return all(p.dtype == torch.float32 for p in get_module(denoiser, group.producer).parameters(recurse=False))


def _rewrite(
    plan: Plan, rows: Sequence[LayerPlan], layer_of: Callable[[str], nn.Module], inputs: Mapping[str, InputStatistics], options: Options
) -> Rewrite:
    """All transforms that apply to every layer of the group, in recipe order."""
    shared = shared_transforms(plan, rows)
    if not shared or rows[0].layer.name not in inputs:
        return Rewrite()
    statistics = inputs[rows[0].layer.name]
    ranges = [None if seen is None else _reach(seen, unseen=plan.unseen) for seen in (statistics.range, statistics.rotated)]
    assert ranges[0] is not None
    weights = [_weight(layer_of(row.layer.name)) for row in rows]
    view = GroupView(*ranges[0], weights, ranges[1], any(row.input for row in rows))
    total = Rewrite()
    for number, step in shared:
        mechanism = step.mechanism(options.get(number, step.choices()[0]))
        assert isinstance(mechanism, Transform)
        rewrite = mechanism.plan(view)
        view, total = view.rewritten(rewrite), total.then(rewrite)
    return total


def shared_transforms(plan: Plan, rows: Sequence[LayerPlan]) -> list[tuple[int, Step]]:
    """The transforms, with their numbers in the recipe, of an input that these layers share: those that apply to all of them."""
    steps = enumerate(plan.recipe.steps)
    return [(number, step) for number, step in steps if step.transform and rows and all(number in row.steps for row in rows)]


def _reach(seen: ChannelRange, *, unseen: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest, highest and mean value of every channel, each ``[steps, channels]``."""
    low, high = seen.envelope(unseen=unseen)
    return low.amin(1), high.amax(1), seen.mean.mean(1)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()


@dataclass(frozen=True, eq=False)
class Made:
    """One quantized layer and what it was made of."""

    layer: QuantLayer
    solution: Solution
    inputs: list[Quantizer] | None
    bias: Tensor | None


def _make_layer(
    plan: Plan, row: LayerPlan, module: nn.Module, rewrite: Rewrite, folds: bool, statistics: InputStatistics | None,
    timesteps: Sequence[float], step: Step | None, solver: Solver,
) -> Made:  # fmt: skip
    assert row.weight is not None
    weight = _weight(module)
    solution = _solve(row.weight, weight, rewrite, statistics, solver)
    inputs = None if row.input is None else _input_quantizers(row.input, rewrite, statistics, unseen=plan.unseen)
    if inputs and len(inputs) not in (1, len(timesteps)):
        raise CalibrationError(f"'{row.layer.name}' ran at {len(inputs)} of {len(timesteps)} steps only: it cannot have scales per step")
    bias = _bias(module, weight, rewrite, statistics, solution, correct=step is not None and step.correct_bias)
    rows = inputs if inputs is None else _with_halves(row.input, rewrite, statistics, inputs, unseen=plan.unseen)
    layout = _layout(row, rewrite, folds, solution, inputs, rows, bias)
    layer = quantized_class(module).like(module, layout, device=weight.device)
    layer.fill(_tensors(row, layout, rewrite, folds, solution, rows, None if bias is None else bias.to(_bias_dtype(module, bias))))
    return Made(layer, solution, inputs, bias)


def _solver(plan: Plan, row: LayerPlan, options: Options) -> tuple[Step | None, Solver]:
    for number in row.steps:
        step = plan.recipe.steps[number]
        if step.solve is not None:
            mechanism = step.mechanism(options.get(number, step.choices()[0]))
            assert isinstance(mechanism, Solver)
            return step, mechanism
    return None, Nearest()


def _solve(spec: QuantSpec, weight: Tensor, rewrite: Rewrite, statistics: InputStatistics | None, solver: Solver) -> Solution:
    matrix = rewrite.weight(weight).flatten(1)
    gram = statistics.gram if statistics is not None else None
    if gram is None:
        return solve(solver, Problem(matrix, spec))
    gram = gram.rotated if rewrite.rotated else gram
    if rewrite.scale is None:
        return solve(solver, Problem(matrix, spec, gram.covariance, gram.inverse_factor))
    scale = rewrite.scale.repeat_interleave(matrix.shape[1] // len(rewrite.scale))

    def factor(damping: float, order: Tensor) -> Tensor:
        return gram.inverse_factor(damping, order) * scale[order]

    return solve(solver, Problem(matrix, spec, gram.covariance / torch.outer(scale, scale), factor))


def _input_quantizers(spec: QuantSpec, rewrite: Rewrite, statistics: InputStatistics | None, *, unseen: bool) -> list[Quantizer] | None:
    """One quantizer per slot, or None if the range is found at run time."""
    if spec.dynamic or statistics is None:
        return None
    features = statistics.features
    if features is not None and not features.varies and spec.slots == "shared" and spec.granularity.kind != "frame":
        return [fit(spec, rewrite.input(features.features))]
    if spec.range.needs_samples or spec.alternatives:
        return [fit(spec, _sampled(rewrite, statistics, spec))]
    return _bound(spec, rewrite, statistics, unseen=unseen)


def _with_halves(
    spec: QuantSpec | None, rewrite: Rewrite, statistics: InputStatistics | None, inputs: list[Quantizer], *, unseen: bool
) -> list[Quantizer]:
    """Three rows a step where the halves of guidance are apart: of any call, of the first half, of the second.

    Formats that were fitted to samples, and ranges of inputs that are the same in both halves, stay joint.
    """
    if spec is None or statistics is None or not statistics.apart or spec.range.needs_samples or spec.alternatives:
        return inputs
    if statistics.features is not None and not statistics.features.varies:
        return inputs
    assert statistics.halves is not None
    first, second = (_bound(spec, rewrite, half, unseen=unseen) for half in statistics.halves)
    return [quantizer for row in zip(inputs, first, second, strict=True) for quantizer in row]


def _bound(spec: QuantSpec, rewrite: Rewrite, statistics: InputStatistics, *, unseen: bool) -> list[Quantizer]:
    """One quantizer per slot, over the ranges of channels that were seen."""
    seen = statistics.rotated if rewrite.rotated else statistics.range
    assert seen is not None
    low, high = (rewrite.affine(v) for v in seen.envelope(per_step=spec.slots == "per_step", unseen=unseen))
    keep = {"tensor": (), "channel": (2,), "frame": (1,)}[spec.granularity.kind]
    over = [dim for dim in (1, 2) if dim not in keep]
    low, high = low.amin(over).reshape(len(low), -1).clamp(max=0), high.amax(over).reshape(len(high), -1).clamp(min=0)
    return [bind(spec.format.stored(), spec.granularity, *pair) for pair in zip(low, high, strict=True)]


def _sampled(rewrite: Rewrite, statistics: InputStatistics, spec: QuantSpec) -> Tensor:
    if statistics.rows is None or spec.granularity.kind != "tensor" or spec.slots != "shared":
        raise UnsupportedError(f"range rules that look at samples work per tensor with shared slots, got {spec} for '{statistics.name}'")
    rows = statistics.rows.rows.to(statistics.range.mean.device)
    return rewrite.per_tap(statistics.geometry.taps).input(rows)


def _bias(
    module: nn.Module, weight: Tensor, rewrite: Rewrite, statistics: InputStatistics | None, solution: Solution, *, correct: bool
) -> Tensor | None:
    """The bias of the quantized layer, float32.

    ``b + W mu - W_q ((mu - z) / s)``: the mean output is that of the float layer whatever the weight's rounding did; exact when it did
    nothing. Without correction only the shift is compensated, ``b + W_q (z / s)``, so that the constant part cancels code by code.
    """
    bias = None if module.bias is None else module.bias.detach().float()
    correct = correct and statistics is not None
    if not correct and rewrite.shift is None:
        return bias
    matrix, rounded = weight.flatten(1), solution.values
    taps = matrix.shape[1] // weight.shape[1]
    per_tap = rewrite.per_tap(taps)
    if correct:
        mean = _mean(statistics, taps)
        extra = matrix @ mean - rounded @ per_tap.input(mean)
    else:
        extra = -(rounded @ per_tap.input(torch.zeros_like(per_tap.shift)))
    return extra if bias is None else bias + extra


def _bias_dtype(module: nn.Module, bias: Tensor) -> torch.dtype:
    """The layer's own dtype; a bias that the layer did not have takes half as much if it fits."""
    created = module.bias is None and float(bias.abs().amax()) < torch.finfo(torch.float16).max / 2
    return torch.float16 if created else module.weight.dtype


def _mean(statistics: InputStatistics, taps: int) -> Tensor:
    if statistics.gram is not None:
        return statistics.gram.mean
    if statistics.rows is not None:
        return statistics.rows.rows.mean(0).to(statistics.range.mean.device)
    return statistics.range.mean.mean((0, 1)).repeat_interleave(taps)


def _layout(
    row: LayerPlan,
    rewrite: Rewrite,
    folds: bool,
    solution: Solution,
    inputs: list[Quantizer] | None,
    rows: list[Quantizer] | None,
    bias: Tensor | None,
) -> LayerLayout:
    assert row.weight is not None
    input_layout = None if row.input is None else TensorLayout.of(row.input, inputs[0].format if inputs else row.input.format)
    return LayerLayout(
        weight=TensorLayout.of(row.weight, solution.quantizer.format),
        input=input_layout,
        slots=len(rows) if rows else 1,
        cfg_halves=rows is not inputs,
        rotate=rewrite.rotated,
        shift=rewrite.shift is not None and not folds,
        scale=rewrite.scale is not None and not folds,
        bias=bias is not None,
        step_invariant=row.layer.role in ("prompt", "constant"),
    )


def _tensors(
    row: LayerPlan,
    layout: LayerLayout,
    rewrite: Rewrite,
    folds: bool,
    solution: Solution,
    inputs: list[Quantizer] | None,
    bias: Tensor | None,
) -> LayerTensors:
    packed = pack(solution.codes, solution.quantizer.format.bits)
    codes = (packed ^ 128).view(torch.int8) if layout.weight.format == "int8" else packed
    extra: dict[str, Tensor] = {}
    if solution.quantizer.zero_point is not None:
        extra["weight_zero_point"] = solution.quantizer.zero_point.to(torch.uint8)
    if layout.weight.levels and solution.quantizer.format.table is not None:
        extra["weight_levels"] = solution.quantizer.format.table.to(LEVEL_DTYPE)
    if inputs:
        extra["input_scale"] = torch.stack([q.scale for q in inputs])
        zeros = [q.zero_point for q in inputs if q.zero_point is not None]
        extra |= {"input_zero_point": torch.stack(zeros)} if zeros else {}
        extra |= {"input_levels": inputs[0].format.table.to(LEVEL_DTYPE)} if inputs[0].format.table is not None else {}
    if not folds:
        extra |= {
            f"pre_quant_{name}": v.to(SHIFT_DTYPE) for name, v in (("shift", rewrite.shift), ("scale", rewrite.scale)) if v is not None
        }
    return LayerTensors(codes, solution.quantizer.scale.to(solution.quantizer.granularity.scale_dtype), bias, extra)


def layer_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's own parameters and buffers."""
    return _bytes([*layer.parameters(recurse=False), *layer.buffers(recurse=False)])


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model."""
    return _bytes([*model.parameters(), *model.buffers()])


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _record(
    plan: Plan, row: LayerPlan, module: nn.Module, made: Made, rewrite: Rewrite, folds: bool, statistics: InputStatistics | None,
    solver: Solver, options: Options,
) -> LayerRecord:  # fmt: skip
    assert row.weight is not None
    facts = _measure(module, rewrite, statistics, row.input, made) if statistics is not None else {}
    found, replaced = made.inputs, made.solution.replaced
    input_name = "float" if row.input is None else str(row.input if not found else QuantSpec(found[0].format, row.input.granularity))
    chosen = {f"{name}.{key}": value for number, values in options.items() if number in row.steps for key, value in values.items()
              for name in [plan.recipe.steps[number].transform or plan.recipe.steps[number].solve]}  # fmt: skip
    return LayerRecord(
        row.layer.name, row.layer.role, str(row.weight), input_name, row.bytes_before, layer_bytes(made.layer), folded=folds,
        solver=(replaced and "nearest") or type(solver).__name__.lower(), replaced=replaced, options=chosen, **facts,
    )  # fmt: skip


def _rounding(spec: QuantSpec | None, inputs: list[Quantizer] | None, statistics: InputStatistics) -> Callable[[Tensor], Tensor] | None:
    """What the layer does to sampled rows of its input; None if rows do not tell."""
    if spec is None:
        return lambda rows: rows
    if spec.dynamic:
        return (lambda rows: dynamic(spec, rows)(rows)) if spec.granularity.kind in ("tensor", "token") else None
    whole = spec.granularity.kind == "tensor" or (spec.granularity.kind == "channel" and statistics.geometry.taps == 1)
    if not inputs or not whole or statistics.rows is None:
        return None
    steps = statistics.rows.steps
    return lambda rows: _by_slot(inputs, steps, rows, Quantizer.__call__)


def _by_slot(inputs: list[Quantizer], steps: Tensor, rows: Tensor, apply: Callable[[Quantizer, Tensor], Tensor]) -> Tensor:
    """Apply to every row the quantizer of its step."""
    if len(inputs) == 1:
        return apply(inputs[0], rows)
    parts = [apply(quantizer, rows[steps.to(rows.device) == slot]) for slot, quantizer in enumerate(inputs)]
    order = torch.cat([(steps == slot).nonzero()[:, 0] for slot in range(len(inputs))])
    return torch.cat(parts)[order.argsort().to(rows.device)]


def _measure(module: nn.Module, rewrite: Rewrite, statistics: InputStatistics, spec: QuantSpec | None, made: Made) -> dict[str, float]:
    """Error, coverage and, for temporal layers, discriminability, on the sampled rows; what rows cannot tell (frame scales) is left out."""
    assert statistics.rows is not None
    inputs = made.inputs
    matrix = _weight(module).flatten(1)
    rows, taps = statistics.rows.rows.to(matrix.device), statistics.geometry.taps
    moved, facts = rewrite.per_tap(taps).input(rows), dict[str, float]()
    rounding = _rounding(spec, inputs, statistics)
    if rounding is not None:
        reference = rows @ matrix.T + (0 if module.bias is None else module.bias.detach().float())
        output = rounding(moved) @ made.solution.quantizer.dequantize(made.solution.codes).T + (0 if made.bias is None else made.bias)
        facts["error"] = float(nmse(reference, output))
    if inputs and rounding is not None:
        codes = _by_slot(inputs, statistics.rows.steps, moved, Quantizer.codes)
        channels = codes.reshape(len(codes), -1, taps).movedim(1, 2).reshape(-1, statistics.geometry.channels)
        facts["coverage"] = float(coverage(channels, inputs[0].format.bits))
    features = statistics.features
    if features is not None and not features.varies and len(features.features) > 1:
        values = features.features
        known = _by_slot(inputs, torch.arange(len(values)), values, Quantizer.__call__) if inputs else None
        test = known if known is not None else rounding(values) if rounding is not None else values
        deviation = values - values.mean()
        facts |= {
            "tdscore": float(tdscore(values, test)),
            "retrieval": float(retrieval_accuracy(values, test)),
            "skewness": float(deviation.pow(3).mean() / deviation.square().mean().clamp(min=1e-20).pow(1.5)),
        }
    return facts
