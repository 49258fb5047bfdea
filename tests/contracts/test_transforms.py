"""Every member of TRANSFORMS leaves the float output of every layer as it was: borders, dead channels, constant channels and all."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant._progress import Silent
from reelquant.discover import discover, dummy_inputs
from reelquant.engine.plan import make_plan
from reelquant.engine.session import Session
from reelquant.engine.store import Memory
from reelquant.kernels import Permutation, Rotation, Scaling, backend, block_size, hadamard
from reelquant.observe import Geometry, RecordedCall
from reelquant.recipes.recipe import load_recipe
from reelquant.transforms import TRANSFORMS, GroupView, Rewrite, Transform
from tests.single import build, one_group, plan_of, statistics, unrounded
from tests.tiny.configs import TINY

# parameters beyond the defaults; a new member is tested with its defaults the moment it enters the table
FURTHER: dict[str, list[dict[str, Any]]] = {
    "shift": [{"center": "mean"}],
    "range_integrate": [{"power": 0.5}, {"power": 0.0}, {"cap": 0.3}],
    "scale": [{"alpha": 0.0}, {"alpha": 1.0}],
    "rotate": [{"least": -100.0}, {"always": True, "signs": True}, {"always": True, "block": 2}],
    "permute": [{"clusters": 2}, {"clusters": 1}],
}
PLANNED = [name for name, member in TRANSFORMS.items() if issubclass(member, Transform)]
WHOLE = [name for name, member in TRANSFORMS.items() if "before_observing" in member.hooks()]
"""Members that act on the float model before anything is observed."""
EXACT: dict[str, dict[str, Any]] = {"narrow_values": {"keep": 1.0}}
"""Parameters with which they change nothing, where their defaults leave something out."""
MEMBERS = [(name, options) for name in PLANNED for options in ({}, *FURTHER.get(name, []))]
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
LAYER = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def skewed(generator: torch.Generator, *shape: int, axis: int = -1) -> Tensor:
    """Channels with offsets and widths over six decades; the first is dead, the second constant."""
    channels = shape[axis]
    width = 10 ** (6 * torch.rand(channels, generator=generator) - 3)
    offset = torch.randn(channels, generator=generator) * 10 ** (4 * torch.rand(channels, generator=generator) - 2)
    width[0], offset[0] = 0, 0
    width[1:2], offset[1:2] = 0, 3.5
    x = torch.randn(*shape, generator=generator).movedim(axis, -1) * width + offset
    return x.movedim(-1, axis).contiguous()


def view(x: Tensor, weights: list[Tensor], axis: int = -1, padded: bool = False) -> GroupView:
    rows = x.movedim(axis, -1).flatten(0, -2)
    taps = weights[0][0, 0].numel()
    sampled = rows.repeat_interleave(taps, -1)  # patches of one value: the ends of their channels are those of the rows
    if padded:
        sampled = torch.cat([sampled, torch.zeros_like(sampled[:1])])
    seam = rows.shape[1] // 2 or None
    return GroupView(*reach(rows, padded), weights, reach(hadamard(rows), padded), rows=sampled, seam=seam)


def reach(rows: Tensor, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest, highest and mean value of every channel, one step."""
    low, high, mean = rows.amin(0), rows.amax(0), rows.mean(0)
    if padded:
        low, high = low.clamp(max=0), high.clamp(min=0)
    return low[None], high[None], mean[None]


def plan(member: tuple[str, dict[str, Any]], group: GroupView) -> Rewrite:
    transform = TRANSFORMS[member[0]](**member[1])
    assert isinstance(transform, Transform)
    return transform.plan(group)


def compensation(rewrite: Rewrite, weight: Tensor) -> Tensor:
    """What the bias gains: ``sum W' (z / s)`` over channels and taps, float64."""
    if rewrite.shift is None:
        return torch.zeros(len(weight), dtype=torch.float64)
    shift = rewrite.shift.double().view(1, -1, *[1] * (weight.ndim - 2))
    return (Rewrite(mixes=rewrite.mixes).weight(weight.double()) * shift).flatten(1).sum(1)


def double(rewrite: Rewrite) -> Rewrite:
    shift, scale = (None if v is None else v.double() for v in (rewrite.shift, rewrite.scale))
    mixes = tuple(Scaling(mix.scale.double()) if isinstance(mix, Scaling) else mix for mix in rewrite.mixes)
    return replace(rewrite, shift=shift, scale=scale, mixes=mixes)


def assert_same(found: Tensor, expected: Tensor, terms: Tensor) -> None:
    """Both float64, so only their rounding differs: 1e-10 of the largest term that a sum is made of."""
    assert float((found - expected).abs().amax()) <= 1e-10 * float(terms.abs().amax().clamp(min=1e-30)) * 1e3


@pytest.mark.parametrize("member", MEMBERS, ids=str)
@given(
    seed=st.integers(0, 999), channels=st.integers(1, 9), outputs=st.lists(st.integers(1, 5), min_size=1, max_size=3), half=st.booleans()
)
def test_linear_groups_keep_their_output(member: Any, seed: int, channels: int, outputs: list[int], half: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = skewed(generator, 11, channels)
    weights = [torch.randn(out, channels, generator=generator) for out in outputs]
    rewrite = plan(member, view(x, weights))
    rewrite = double(rewrite.stored(torch.bfloat16) if half else rewrite)  # the rounded vectors are as exact as the others
    for weight in weights:
        found = F.linear(rewrite.input(x.double()), rewrite.weight(weight.double()), compensation(rewrite, weight))
        assert_same(found, F.linear(x.double(), weight.double()), x)
        # 1e-5 relative in the arithmetic of the layers: float32
        found32 = rewrite.input(x.double()).float() @ rewrite.weight(weight.double()).float().T + compensation(rewrite, weight).float()
        size = float((x.abs().amax(0) * weight.abs().amax(0)).amax())
        assert float((found32 - F.linear(x, weight)).abs().amax()) <= 1e-5 * max(size, 1e-6)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("member", MEMBERS, ids=str)
@given(
    seed=st.integers(0, 999), dims=st.sampled_from([1, 2, 3]), channels=st.integers(1, 5), kernel=st.integers(1, 3),
    stride=st.integers(1, 2), dilation=st.integers(1, 2), padding=st.sampled_from([0, 1, 2, "same", "valid"]), half=st.booleans(),
)  # fmt: skip
def test_convolutions_keep_their_output_up_to_the_border(
    member: Any, seed: int, dims: int, channels: int, kernel: int, stride: int, dilation: int, padding: int | str, half: bool
) -> None:
    stride = 1 if padding == "same" else stride  # torch refuses the pair
    generator = torch.Generator().manual_seed(seed)
    layer = LAYER[dims](channels, 3, kernel, stride, padding, dilation)
    x = skewed(generator, 2, channels, *[6] * dims, axis=1)
    geometry = Geometry.of(layer)
    padded = F.pad(x, geometry.padding) if geometry.padded else x
    weight = torch.randn(layer.weight.shape, generator=generator)
    rewrite = plan(member, view(x, [weight], axis=1, padded=geometry.padded))
    rewrite = double(rewrite.stored(torch.bfloat16) if half else rewrite)
    moved = rewrite.input(padded.double().movedim(1, -1)).movedim(-1, 1)
    found = CONV[dims](moved, rewrite.weight(weight.double()), compensation(rewrite, weight), stride=stride, dilation=dilation)
    expected = CONV[dims](x.double(), weight.double(), stride=stride, padding=padding, dilation=dilation)
    assert_same(found, expected, x)


@given(seed=st.integers(0, 999), first=st.sampled_from(MEMBERS), second=st.sampled_from(MEMBERS))
def test_then_is_one_after_the_other(seed: int, first: Any, second: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = skewed(generator, 12, 6), torch.randn(4, 6, generator=generator)
    group = view(x, [weight])
    one = plan(first, group)
    two = plan(second, group.rewritten(one))
    both = one.then(two)
    # float32 vectors: a few roundings of the operands, whose size the shift may dwarf the result with
    steps = [double(one).input(x.double())]
    steps.append(double(two).input(steps[0]))
    divisors = [two.scale, *(mix.vector for mix in two.mixes if isinstance(mix, Scaling))]
    smallest = min((float(one.abs().amin()) for one in divisors if one is not None), default=1.0)
    slack = 1e-6 * float(steps[0].abs().amax()) / smallest + 1e-12
    torch.testing.assert_close(double(both).input(x.double()), steps[1], rtol=1e-5, atol=slack)
    scaled = max(float(two.weight(one.weight(weight)).abs().amax()), 1e-12)
    torch.testing.assert_close(both.weight(weight), two.weight(one.weight(weight)), rtol=1e-6, atol=1e-6 * scaled)
    exact = double(both)
    torch.testing.assert_close(exact.undone(exact.weight(weight.double())), weight.double(), rtol=0, atol=1e-6)  # scales over six decades
    if not any(isinstance(mix, Rotation) for mix in both.mixes):
        torch.testing.assert_close(group.rewritten(both).low, group.rewritten(one).rewritten(two).low, rtol=1e-3, atol=1e-2)


def test_the_identity_is_neutral_and_knows_itself() -> None:
    some = Rewrite(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))
    assert Rewrite().identity and not some.identity
    for both in (Rewrite().then(some), some.then(Rewrite())):
        assert torch.equal(both.shift, some.shift) and torch.equal(both.scale, some.scale)


def test_then_by_hand() -> None:
    # ((x - 1) / 2 - 3) / 4 = (x - 7) / 8
    both = Rewrite(torch.tensor([1.0]), torch.tensor([2.0])).then(Rewrite(torch.tensor([3.0]), torch.tensor([4.0])))
    assert both.shift.tolist() == [7.0] and both.scale.tolist() == [8.0]


@given(dims=st.sampled_from([1, 2, 3]), seed=st.integers(0, 99))
def test_per_tap_agrees_with_the_flattened_weight(dims: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, *[2] * dims, generator=generator)
    rewrite = Rewrite(torch.randn(4, generator=generator), torch.rand(4, generator=generator) + 0.5)
    taps = 2**dims
    tap = rewrite.per_tap(taps)
    torch.testing.assert_close(rewrite.weight(weight).flatten(1), weight.flatten(1) * tap.scale, rtol=0, atol=0)
    patches = torch.randn(5, 4 * taps, generator=generator)
    expected = torch.stack([rewrite.input(patches.reshape(5, 4, taps)[..., i]) for i in range(taps)], -1).flatten(1)
    torch.testing.assert_close(tap.input(patches), expected, rtol=0, atol=0)


def test_what_the_members_do() -> None:
    low, high = torch.tensor([[-1.0, 0.0, -8.0]]), torch.tensor([[3.0, 0.0, 8.0]])
    group = GroupView(low, high, torch.tensor([[0.5, 0.0, 1.0]]), [torch.tensor([[1.0, 1.0, 4.0]])])
    assert TRANSFORMS["shift"]().plan(group).shift.tolist() == [1.0, 0.0, 0.0]
    assert TRANSFORMS["shift"](center="mean").plan(group).shift.tolist() == [0.5, 0.0, 1.0]
    full = TRANSFORMS["range_integrate"](power=1.0).plan(group).scale
    assert full[[0, 2]].tolist() == [0.375, 1.0] and full[1] > 0  # 3 / 8, and a dead channel stays finite
    cap = TRANSFORMS["range_integrate"](cap=0.5).plan(group).scale
    assert cap.tolist() == [1.0, 1.0, 2.0]  # only what exceeds half of 8 shrinks
    smooth = TRANSFORMS["scale"](alpha=0.5).plan(group).scale
    assert float(smooth[0] / smooth[2]) == pytest.approx((3 / 1) ** 0.5 / (8 / 4) ** 0.5)


def test_rotate_pays_for_a_lone_outlier_and_not_for_channels_that_fill_their_range() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    spiked = x.clone()
    spiked[3, 5] = 40.0
    weight = torch.ones(2, 8)
    assert not TRANSFORMS["rotate"](least=3.0).plan(view(x, [weight])).rotated
    assert TRANSFORMS["rotate"](least=3.0).plan(view(spiked, [weight])).rotated is False  # one channel: nothing to share
    everywhere = x.clone()
    everywhere[range(8), range(8)] = 40.0  # every channel has one token that reaches far
    assert TRANSFORMS["rotate"](least=3.0).plan(view(everywhere, [weight])).rotated


@given(channels=st.sampled_from([1, 2, 3, 6, 12, 32, 96, 512]), seed=st.integers(0, 99))
def test_hadamard_is_a_symmetric_orthonormal_block_matrix(channels: int, seed: int) -> None:
    matrix = hadamard(torch.eye(channels, dtype=torch.float64))
    width = block_size(channels)
    assert channels % width == 0 and width & (width - 1) == 0
    sylvester = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(width)] for i in range(width)], dtype=torch.float64)
    expected = torch.block_diag(*[sylvester / width**0.5] * (channels // width))
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-12)
    x = torch.randn(3, channels, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(hadamard(hadamard(x, 1), 1), x, rtol=0, atol=1e-12)


class Normed(nn.Module):
    """A norm and two layers that read it."""

    def __init__(self, norm: nn.Module, conv: bool) -> None:
        super().__init__()
        self.norm = norm
        make = (lambda: nn.Conv2d(8, 6, 1)) if conv else (lambda: nn.Linear(8, 6))
        self.a, self.b = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.a(x) + 2 * self.b(x)


NORMS = {
    "LayerNorm": lambda: (nn.LayerNorm(8), False, True),
    "RMSNorm": lambda: (nn.RMSNorm(8), False, False),
    "GroupNorm": lambda: (nn.GroupNorm(2, 8), True, True),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_folding_into_a_norm_is_exact(kind: str, dtype: torch.dtype) -> None:
    norm, conv, fold_shift = NORMS[kind]()
    for p in norm.parameters():
        nn.init.normal_(p, 1.0, 0.5)
    model = Normed(norm, conv).to(dtype)
    x = torch.randn(2, 8, 3, 3) if conv else torch.randn(4, 5, 8)
    x = x.to(dtype)
    steps = [{"transform": "shift"}] if fold_shift else []
    steps += [{"transform": "range_integrate", "power": 0.5}]
    map_ = one_group(model, ("a", "b"), producer="norm", producer_kind=kind, foldable=True, fold_shift=fold_shift)
    plan_ = plan_of(model, map_, {"format": "int8", "granularity": "channel"}, {"format": "int8"}, steps)
    expected, middle, before = model(x), norm(x), {k: v.clone() for k, v in model.state_dict().items()}
    built = build(model, ("a", "b"), [middle.detach()], {"format": "int8", "granularity": "channel"}, {"format": "int8"}, steps,
                  producer="norm", producer_kind=kind, foldable=True, fold_shift=fold_shift)  # fmt: skip
    built = unrounded(built)
    folds = dtype == torch.float32  # half precision would round gamma and beta, so the rewrite stays in the layers
    assert all(record.folded == folds for record in built.records)
    assert all(hasattr(layer, "pre_quant_scale") != folds for layer in built.layers.values())
    session = Session(None, "", model, plan_, Memory(model), Silent())
    session.install([built])
    if folds:
        axis = 1 if conv else -1
        moved = built.fold.input(middle.movedim(axis, -1)).movedim(-1, axis)
        torch.testing.assert_close(model.norm(x), moved, rtol=1e-5, atol=1e-5)  # float32 of the norm, order of operations differs
    # 8-bit weights: 1 / 127 / sqrt(12) of the largest weight, over 8 channels: well under 2 % of the output's deviation
    assert float((model(x) - expected).float().std() / expected.float().std()) < 0.02
    session.restore()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_rewrite_stays_out_of_the_norm_when_a_reader_is_kept_or_the_norm_has_no_bias() -> None:
    steps, weight = [{"transform": "shift"}], {"format": "int8", "granularity": "channel"}
    model = Normed(nn.RMSNorm(8), conv=False)
    built = build(
        model, ("a", "b"), [torch.randn(9, 8) + 3], weight, {"format": "int8"}, steps, producer="norm", foldable=True, fold_shift=False
    )
    assert built.fold is None and all(hasattr(layer, "pre_quant_shift") for layer in built.layers.values())
    seen = statistics(model.a, [torch.randn(9, 8)])
    assert seen.range.seen == [0]


def test_ranges_stay_where_they_are_when_nothing_is_rounded() -> None:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9) + 5
    group = replace(view(x, [torch.ones(2, 8)]), rounded=False)
    for name in ("shift", "range_integrate", "rotate"):
        assert TRANSFORMS[name]().plan(group).identity, name
    assert not TRANSFORMS["scale"]().plan(group).identity  # smoothing also serves weights


# --- every ordered pair, through the engine -------------------------------------------------------------------------------------

STEPS = {
    "shift": {"transform": "shift"},
    "scale": {"transform": "scale"},
    "scale_search": {"transform": "scale_search", "grid": 2},
    "range_integrate": {"transform": "range_integrate", "power": 0.5},
    "rotate": {"transform": "rotate", "always": True},
    "signs": {"transform": "rotate", "always": True, "signs": True, "block": 4},
    "permute": {"transform": "permute", "clusters": 3},
    "split": {"transform": "split"},
}
KINDS = {
    "Linear": (lambda: nn.Linear(24, 6), (40, 24), -1),
    "Conv2d": (lambda: nn.Conv2d(8, 5, 3, padding=(2, 1), stride=(1, 2)), (2, 8, 6, 7), 1),
}


def test_every_member_is_among_the_pairs() -> None:
    assert {step["transform"] for step in STEPS.values()} == set(PLANNED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("second", STEPS)
@pytest.mark.parametrize("first", STEPS)
@torch.no_grad()
def test_every_ordered_pair_keeps_the_float_output(first: str, second: str, kind: str) -> None:
    """Weights in 8 bits with and without the pair round alike to half a step; and the layer without rounding is the float layer."""
    torch.manual_seed(0)
    make, shape, axis = KINDS[kind]
    module = make()
    x = torch.randn(shape).movedim(axis, -1) * (0.5 + torch.arange(shape[axis]) % 5) + torch.linspace(-2, 3, shape[axis])
    x, steps = x.movedim(-1, axis).contiguous(), [STEPS[first], STEPS[second]]
    weight, inputs = {"format": "int8", "granularity": "channel"}, {"format": "int8"}
    built = build(nn.ModuleDict({"layer": module}), ["layer"], [x], weight, inputs, steps, seam=shape[axis] // 2)
    layer = built.layers["layer"]
    with backend("reference"):
        rounded = layer(x)
    float_layer = copy.deepcopy(module)
    float_layer.weight.copy_(layer.dequantized_weight())
    float_layer.bias.copy_(layer.float_bias())
    exact = unrounded(built).layers["layer"]
    for name in ("reference", "auto"):
        with backend(name):
            exact.release()
            found = exact(x)
        # 1e-5 of the largest output: float32, and the layer whose weight undoes the chain is the layer that computes it
        torch.testing.assert_close(found, float_layer(x), rtol=0, atol=1e-5 * float(found.abs().amax()))
    expected = module(x)
    assert float((exact(x) - expected).std() / expected.std()) < 0.02  # 8-bit weights
    assert float((rounded - expected).std() / expected.std()) < 0.1  # and 8-bit inputs with ranges that fit the rewritten input


@torch.no_grad()
def test_a_scale_folds_into_the_norm_and_the_rotation_after_it_stays() -> None:
    model = Normed(nn.LayerNorm(8), conv=False)
    nn.init.uniform_(model.norm.weight, 0.2, 3.0)
    x = torch.randn(30, 8)
    steps = [{"transform": "scale"}, {"transform": "rotate", "always": True}]
    weight, group = {"format": "int8", "granularity": "channel"}, {"producer": "norm", "producer_kind": "LayerNorm", "foldable": True}
    built = unrounded(build(model, ("a", "b"), [model.norm(x)], weight, {"format": "int8"}, steps, fold_shift=True, **group))
    assert built.fold is not None and not built.fold.mixes and built.fold.shift is None
    for name, layer in built.layers.items():
        assert layer.layout.rotate and not layer.layout.mix and not layer.layout.scale
        found, expected = layer(built.fold.input(model.norm(x))), model.get_submodule(name)(model.norm(x))
        assert float((found - expected).std() / expected.std()) < 0.02


def test_permute_by_hand() -> None:
    high = torch.tensor([[9.0, 1.0, 10.0, 2.0]])
    group = GroupView(-high, high, torch.zeros(1, 4), [torch.ones(2, 4)])
    (mix,) = TRANSFORMS["permute"](clusters=2).plan(group).mixes
    assert isinstance(mix, Permutation) and mix.order.tolist() == [1, 3, 0, 2]
    assert mix(torch.tensor([10.0, 20.0, 30.0, 40.0])).tolist() == [20.0, 40.0, 10.0, 30.0]


def test_ranges_that_nobody_observed_are_refused_before_sampling() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(8, 4)})
    map_ = one_group(model, ("layer",))
    weight, steps = {"format": "int8", "granularity": "channel"}, [STEPS["scale"], STEPS["rotate"]]
    plan_of(model, map_, weight, {"format": "int8"}, steps)
    plan_of(model, map_, weight, {"format": "int8", "granularity": "token", "dynamic": True}, steps)
    for grain in ({"slots": "per_step"}, {"granularity": "channel"}):
        with pytest.raises(UnsupportedError, match=r"a rotation after other rewrites.*put 'transform: rotate' first, or set dynamic: true"):
            plan_of(model, map_, weight, {"format": "int8"} | grain, steps)


# --- members that change the float model ------------------------------------------------------------------------------------------

DENOISERS = ("WanTransformer3DModel", "UNetMotionModel", "LTXVideoTransformer3DModel")


@pytest.mark.parametrize("cls", DENOISERS)
@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_members_that_change_the_float_model_keep_its_output_and_can_be_undone(name: str, cls: str) -> None:
    model = TINY[cls]().double()  # with such weights a rounding of float32 grows to 0.06
    for seed, parameter in enumerate(model.parameters()):  # norms with weights of many sizes, channels with different ranges
        width = torch.rand(parameter.shape[-1:], generator=torch.Generator().manual_seed(seed))
        parameter.mul_((4 * width - 2).exp())
    before, inputs = {key: value.clone() for key, value in model.state_dict().items()}, dummy_inputs(model)
    expected = model(**inputs)[0]
    step = {"transform": name, **EXACT.get(name, {})}
    calibrate = {"prompts": 1} if TRANSFORMS[name]().needs_data else None
    recipe = load_recipe({"name": "test", "defaults": {"weight": {"format": "int8"}}, "calibrate": calibrate, "steps": [step]})
    session = Session(None, "", model, make_plan(recipe, discover(model), model), Memory(model), Silent())
    session.sampled_calls = lambda clips, calls: [RecordedCall((), inputs, None)]  # type: ignore[method-assign]
    (entry,) = session.plan.entries
    entry.stage.before_observing(session)
    assert not session.warnings and any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().amax()))
    session.roll_back()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
