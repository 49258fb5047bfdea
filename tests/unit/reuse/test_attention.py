"""Attention that is reused: what each mode gives and multiplies, where and when it acts, and how modes are chosen."""

from __future__ import annotations

import copy
import itertools
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelquant._errors import CheckpointError, RecipeError, SiteError, UnsupportedError
from reelquant.graphs.refusals import refuse_model
from reelquant.kernels.attention import REFERENCE, STOCK, AttentionQuant
from reelquant.nn import AttentionCall, round_attention
from reelquant.nn.around.attention import HOOKS, PROTECTED
from reelquant.reuse import AttentionReuse, install_stored
from reelquant.reuse.attention.choosing import Measured, chosen
from reelquant.reuse.attention.courses import ByTable
from reelquant.reuse.attention.halves import Halves
from reelquant.reuse.attention.installed import InstalledAttention
from reelquant.reuse.attention.mode import Mode, Place
from reelquant.reuse.attention.planned import cheapest, forecasts, pauses, plan
from reelquant.reuse.attention.recorded import Recorded, record
from reelquant.reuse.attention.share import Share
from reelquant.reuse.attention.sparse import Sparse, heaviest, masses
from reelquant.reuse.attention.window import Window
from reelquant.reuse.trajectory import Trajectory
from reelquant.sites import AttentionSite, DenoiserMap

TOKENS, WIDTH = 32, 8


def call(
    seed: int = 0, batch: int = 2, heads: int = 3, queries: int = TOKENS, keys: int = TOKENS, mask: Tensor | None = None
) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    sizes = (queries, keys, keys)
    return AttentionCall(*(torch.randn(batch, heads, size, WIDTH, generator=generator) for size in sizes), None, mask)


def computed(one: AttentionCall) -> Tensor:
    return STOCK(one.query, one.key, one.value, one.mask, scale=one.scale)


class Clip:
    """Calls of one site in the course of a clip."""

    def __init__(self) -> None:
        self.notes: dict[Any, Any] = {}

    def at(self, step: int, one: AttentionCall, half: int = 0, twice: bool = False, timestep: float = 0.0) -> Place:
        return Place(one, computed, self.notes, self.notes, half=half, step=step, twice=twice, timestep=timestep)

    def compute(self, mode: Mode, step: int, one: AttentionCall, **more: Any) -> Tensor:
        place = self.at(step, one, **more)
        output = place.compute(one)
        mode.keep(place, output)
        return output


# --- modes --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [Share(), Window(0.25), Halves(window=0.25), Sparse()])
def test_without_a_computed_step_nothing_stands_for_a_call(mode: Mode) -> None:
    assert mode.attend(Clip().at(0, call())) is None


def test_a_shared_output_is_that_of_the_last_computed_step_and_nobody_writes_into_it() -> None:
    clip, first = Clip(), call(0)
    expected = clip.compute(Share(), 0, first).clone()
    place = clip.at(1, call(1))
    found = Share().attend(place)
    assert found is not None and torch.equal(found, expected) and place.multiplied == 0
    found += 1
    assert torch.equal(Share().attend(place), expected)
    assert Share().attend(clip.at(2, call(2, queries=5))) is None


@pytest.mark.parametrize("masked", [False, True])
def test_a_window_adds_what_the_other_keys_made_and_multiplies_its_share(masked: bool) -> None:
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool) if masked else None
    if mask is not None:
        mask[:, :, :, 5] = False
    clip, one, mode = Clip(), call(mask=mask), Window(0.25)
    expected = clip.compute(mode, 0, one)
    place = clip.at(1, one)
    torch.testing.assert_close(mode.attend(place), expected)  # the same operands: window plus residual is all of it
    assert place.multiplied == one.multiplications // 4
    other, place = call(1, mask=mask), clip.at(2, call(1, mask=mask))
    near = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for start in range(0, TOKENS, 2):  # a window of 8 keys moves by 2
        first = min(max((start + start + 2 - 8) // 2, 0), TOKENS - 8)
        near[start : start + 2, first : first + 8] = True
    seen = near if mask is None else near & mask

    def by_hand(one: AttentionCall) -> Tensor:
        return F.scaled_dot_product_attention(one.query, one.key, one.value, seen)

    torch.testing.assert_close(mode.attend(place), by_hand(other) + expected - by_hand(one))


def test_a_window_without_a_key_that_may_be_seen_adds_nothing() -> None:
    mask = torch.ones(1, 1, 1, TOKENS, dtype=torch.bool)
    mask[..., : TOKENS // 2] = False
    for one in (call(mask=mask), call(mask=torch.zeros(1, 1, 1, TOKENS).masked_fill(~mask, -torch.inf))):
        clip = Clip()
        expected = clip.compute(Window(0.25), 0, one)
        torch.testing.assert_close(Window(0.25).attend(clip.at(1, one)), expected)


def test_windows_are_for_attention_to_the_same_tokens() -> None:
    clip, one = Clip(), call(keys=TOKENS // 2)
    clip.compute(Window(), 0, one)
    assert Window().attend(clip.at(1, one)) is None


def test_a_line_goes_through_the_last_two_outputs_in_the_timestep() -> None:
    clip, calls = Clip(), [call(seed) for seed in range(3)]
    first, second = (clip.compute(Share(1), step, calls[step], timestep=10.0 - 2 * step).clone() for step in (0, 1))
    expected = second + 1.5 * (second - first)  # 10, 8, and 5
    torch.testing.assert_close(Share(1).attend(clip.at(2, calls[2], timestep=5.0)), expected)
    fitted = Share(1, fitted=(0.25, 0.5)).attend(clip.at(2, calls[2], timestep=5.0))
    torch.testing.assert_close(fitted, 0.25 * first + 0.5 * second)  # remembers the same outputs as the line


@pytest.mark.parametrize("window", [1.0, 0.5])
def test_the_second_half_of_one_call_stands_for_both(window: float) -> None:
    clip, one, mode = Clip(), call(), Halves(window)
    expected = clip.compute(mode, 0, one, twice=True)[1:]
    place = clip.at(1, one, twice=True)
    torch.testing.assert_close(mode.attend(place), torch.cat([expected, expected]))
    assert place.multiplied == one.multiplications * window / 2


def test_the_first_of_two_calls_stands_for_both_at_the_same_step_only() -> None:
    clip, first, second = Clip(), call(0), call(1)
    found = Halves().attend(clip.at(1, first))
    place = clip.at(1, second, half=1)
    assert torch.equal(Halves().attend(place), computed(first)) and torch.equal(found, computed(first)) and place.multiplied == 0
    assert Halves().attend(clip.at(2, second, half=1)) is None
    assert Halves().attend(clip.at(1, second, half=2)) is None  # a third call is no half of guidance


@pytest.mark.parametrize(("keys", "masked"), [(64, False), (61, False), (64, True), (61, True)])
def test_sparse_attention_sees_its_blocks_and_no_other(keys: int, masked: bool) -> None:
    mask = torch.zeros(2, 3, 1, keys) if masked else None
    if mask is not None:
        mask[0, 1, :, 7:30] = -torch.inf
    one, mode, clip = call(queries=50, keys=keys, mask=mask), Sparse(density=0.25, block=4), Clip()
    clip.compute(mode, 0, one)
    rows, size = mode.sizes(one)
    blocks = heaviest(masses(one, rows, size), 0.25)
    seen = torch.zeros(2, 3, 50, keys, dtype=torch.bool)
    for head, chosen_ in enumerate(blocks):
        for item in range(2):
            for row, columns in enumerate(chosen_[item]):
                for column in columns.tolist():
                    seen[item, head, row * rows : (row + 1) * rows, column * size : (column + 1) * size] = True
    later, place = call(1, queries=50, keys=keys, mask=mask), clip.at(1, call(1, queries=50, keys=keys, mask=mask))
    bias = torch.zeros(2, 3, 50, keys).masked_fill(~seen, -torch.inf) + (0 if mask is None else mask)
    expected = F.scaled_dot_product_attention(later.query, later.key, later.value, bias)
    found = mode.attend(place)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert 0.2 < place.multiplied / one.multiplications < 0.35  # 0.25 of the blocks; the last ones are filled up


def test_all_blocks_are_attention_bit_for_bit() -> None:
    clip, one = Clip(), call()
    clip.compute(Sparse(density=1.0), 0, one)
    assert torch.equal(Sparse(density=1.0).attend(clip.at(1, call(1))), computed(call(1)))


def test_heads_that_spread_their_weights_get_more_blocks() -> None:
    mass = torch.full((1, 2, 4, 16), 1 / 16)
    mass[:, 0] = 0.01 / 15
    mass[:, 0, :, 3] = 0.99
    blocks = heaviest(mass, 0.5)
    assert [one.shape for one in blocks] == [(1, 4, 1), (1, 4, 15)] and bool((blocks[0] == 3).all())
    assert sum(one.shape[-1] for one in heaviest(torch.rand(2, 3, 4, 16), 0.5)) == 24


def test_blocks_by_need_hold_more_weight_than_as_many_for_every_head() -> None:
    """Where half of the blocks hold nine tenths of the weights, and the heads are not alike."""
    one = call(heads=4, queries=64, keys=64)
    one = one._replace(query=one.query * torch.tensor([0.1, 0.5, 1.5, 4.0]).view(1, 4, 1, 1))
    mass = masses(one, 4, 4)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 4, 16))
    held = [mass[:, head].gather(2, blocks).sum(2).mean() for head, blocks in enumerate(heaviest(mass, 0.5))]
    equal = mass.sort(-1, descending=True)[0][..., :8].sum(-1).mean()
    assert float(torch.stack(held).mean()) > float(equal) > 0.5


def test_fewer_queries_of_a_group_and_finer_blocks_hold_more_weight() -> None:
    one = call(queries=64, keys=64)
    held = []
    for mode in (Sparse(), Sparse(block=2, queries=2)):
        mass = masses(one, *mode.sizes(one))
        blocks = heaviest(mass, mode.density)
        held.append(float(torch.stack([mass[:, head].gather(2, chosen_).sum(2).mean() for head, chosen_ in enumerate(blocks)]).mean()))
    assert Sparse().sizes(one) == (4, 4) and Sparse(queries=2).sizes(one) == (2, 4) and held[1] > held[0] + 0.02


def test_a_gather_in_parts_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    clip, one, mode = Clip(), call(), Sparse(density=0.5, block=2)
    clip.compute(mode, 0, one)
    whole = mode.attend(clip.at(1, one))
    monkeypatch.setattr("reelquant.reuse.attention.sparse.GATHERED", 1)
    torch.testing.assert_close(mode.attend(clip.at(1, one)), whole)


# --- parameters ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": ({"mode": "share"},)}, r"rules.0 of reuse 'attention' names its places like .*got \{'mode': 'share'\}"),
        ({"rules": ({"on": "*", "mode": "shares"},)}, "there is no mode 'shares' of attention; did you mean 'share'"),
        ({"rules": ({"on": "*", "mode": "window", "size": 3},)}, "mode 'window' has no option 'size'; known: window"),
        (
            {"rules": ({"on": "*", "mode": "window", "window": 0},)},
            r"rules.0 .*'window' of attention's mode 'window' is a share in \(0, 1\], got 0",
        ),
        (
            {"rules": ({"on": "*", "mode": "sparse", "block": 0},)},
            "'block' of attention's mode 'sparse' is a number of tokens, 1 or more, got 0",
        ),
        ({"rules": ({"on": "*", "mode": "sparse", "queries": 0},)}, "'queries' of attention's mode 'sparse' is a number of tokens"),
        ({"rules": ({"on": "*", "mode": "share", "every": 0},)}, "rules.0 .*1 or more, got 0 and 1"),
        ({"rules": ({"on": "*", "mode": "share", "every": "2"},)}, "'every' and 'first' are whole numbers"),
        ({"rules": ({"on": "*", "mode": "share", "at": ["a"]},)}, "'at' is a list of timesteps, got"),
        ({"rules": ({"on": "*", "mode": ["share"]},)}, r"there is no mode \['share'\] of attention; did you mean 'share'"),
        ({"threshold": 1.5}, "from 0 to 1, got 1.5"),
        ({"threshold": 0.1, "longest": 0}, "'longest' of reuse 'attention' is 1 or more"),
        ({"longest": 3}, "belong to a threshold"),
        ({"threshold": 0.1, "rules": ({"on": "*", "mode": "halves"},)}, "has rules and threshold beside each other; keep one"),
        ({"threshold": 0.1, "budget": 0.5}, "has threshold and budget beside each other; keep one"),
        ({"budget": 0.0}, "'budget' of reuse 'attention' is a share of its multiplications, above 0 and up to 1, got 0.0"),
        ({"rules": ({"on": "*", "mode": "share", "order": 3},)}, "'order' of a reuse is 0 .*got 3"),
        ({"rules": ({"on": "*", "mode": "share", "fitted": (0.5, 0.5)},)}, "of order 0 has up to 1 weights"),
        ({"threshold": 0.1, "candidates": ({"mode": "half"},)}, r"candidates.0 .*no mode 'half' of attention; did you mean 'halves'"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        AttentionReuse(**options)


class Denoiser(nn.Module):
    """Three places of attention; each adds what it gives to the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Any = nn.ModuleList(Attends() for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for place in self.places:
            x = x + place(x + timestep / 10)
        return x


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x.roll(1, -1), x.roll(2, -1))


SITES = tuple(AttentionSite(f"places.{number}", "Attends", "self") for number in range(3))


def work(model: nn.Module, **names: Any) -> Any:
    names = {"timestep_argument": "timestep", "latent_argument": "x", "attention": SITES} | names
    return SimpleNamespace(denoiser=model, component="transformer", map=DenoiserMap("Denoiser", {}, (), (), **names))


def installed(*rules: dict[str, Any]) -> tuple[Denoiser, InstalledAttention]:
    model, stage = Denoiser(), AttentionReuse(rules=rules) if rules else AttentionReuse()
    return model, stage.install(model, stage.facts(work(model)))


@torch.no_grad()
def outputs(model: nn.Module, times: tuple[float, ...] = (9.0, 7.0, 5.0)) -> list[Tensor]:
    return [model(latents(time), torch.tensor(time)) for time in times]


def latents(time: float) -> Tensor:
    return torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(int(time)))


def test_the_last_rule_that_names_a_place_holds() -> None:
    model, reuse = installed(
        {"on": "*", "mode": "share", "every": 3}, {"on": "places.1", "mode": "computed"}, {"on": "places.2", "mode": "share"}
    )
    assert reuse.parts == ["places.0", "places.2"]
    outputs(model)
    whole = 3 * call(batch=1, heads=2, queries=8, keys=8).multiplications // 2
    assert reuse.by_step() == {0: (whole, 0), 1: (whole // 3, whole // 3 * 2), 2: (whole // 3 * 2, whole // 3)}
    assert reuse.counts() == {"computed": 2 * whole, "reused": whole}
    assert reuse.by_part() == {"places.0": (whole // 3, whole // 3 * 2), "places.2": (whole // 3 * 2, whole // 3)}


def test_damaged_facts_are_refused_before_anything_is_installed() -> None:
    names, model = {"timestep": "timestep", "latent": "x"}, Denoiser()
    broken: list[dict[str, Any]] = [
        {"rules": {"places.0": 7}},
        {"table": {"places.0": [-1, 9]}, "timesteps": [9.0, 7.0]},
        {"table": {"places.0": [-1]}, "timesteps": [9.0, 7.0]},
    ]
    for facts in broken:
        stored = {"options": {"threshold": 0.1} if "table" in facts else {}, "facts": names | facts}
        with pytest.raises(CheckpointError, match=r"reuse\.attention cannot be installed"):
            install_stored(model, {"attention": stored})
    assert HOOKS not in vars(model) and not model._forward_pre_hooks


def test_a_rule_that_names_no_place_is_refused() -> None:
    with pytest.raises(SiteError, match=r"rules.0.on of reuse 'attention': pattern 'others' matches none of 3 attention sites"):
        installed({"on": "others", "mode": "share"})
    with pytest.raises(SiteError, match="the rules of reuse 'attention' name none of the 3 places where Denoiser attends"):
        installed({"on": "role:cross", "mode": "share"})


@pytest.mark.parametrize(
    ("names", "message"),
    [({"timestep_argument": None}, "'transformer' has none; use it for a denoiser"), ({"attention": ()}, "nothing of Denoiser calls")],
)
def test_components_without_timestep_or_attention_are_refused(names: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        AttentionReuse().facts(work(Denoiser(), **names))


# --- on a model ---------------------------------------------------------------------------------------------------------------------


def test_shared_steps_add_what_the_computed_one_gave() -> None:
    model, reuse = installed()
    plain = outputs(Denoiser())
    found = outputs(model)
    assert torch.equal(found[0], plain[0]) and torch.equal(found[2], plain[2])
    torch.testing.assert_close(found[1] - latents(7.0), plain[0] - latents(9.0))
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), found, strict=True))  # a rising timestep begins a new clip
    reuse.reset()
    assert reuse.counts() == {"computed": 0, "reused": 0} and torch.equal(outputs(model)[1], found[1])


def test_a_call_with_gradients_computes_everything() -> None:
    model, _ = installed()
    outputs(model, (9.0,))
    x = latents(7.0).requires_grad_()
    found = model(x, torch.tensor(7.0))
    found.sum().backward()
    assert torch.equal(found.detach(), outputs(Denoiser(), (7.0,))[0]) and x.grad is not None


class Masked(Attends):
    """Every token sees those before it; once by a mask, and once because it is told so."""

    told = False

    def forward(self, x: Tensor) -> Tensor:
        if self.told:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return F.scaled_dot_product_attention(x, x, x, torch.ones(1, 1, 8, 8, dtype=torch.bool).tril())


@pytest.mark.parametrize("mode", ["share", "window", "halves", "sparse"])
def test_masks_over_pairs_of_tokens_keep_their_meaning(mode: str) -> None:
    """The latents are the same at both steps, so what stands for a call is what computing gives; blocks would leave tokens out."""
    model, plain = Denoiser(), Denoiser()
    for one in (model, plain):
        one.places = nn.ModuleList([Masked()])
    stage = AttentionReuse(rules=({"on": "*", "mode": mode},))
    reuse = stage.install(model, stage.facts(work(model, attention=SITES[:1])))
    with torch.no_grad():
        for time in (9.0, 9.0 - 1e-6):
            torch.testing.assert_close(model(latents(9.0), torch.tensor(time)), plain(latents(9.0), torch.tensor(time)))
    saved = reuse.counts()["reused"]
    assert (saved != 0) == (mode in ("share", "window"))  # without guidance, no half can stand for another


def test_causal_calls_are_computed() -> None:
    model, plain = Denoiser(), Denoiser()
    for one in (model, plain):
        one.places[1] = Masked()
        one.places[1].told = True
    stage = AttentionReuse()
    stage.install(model, stage.facts(work(model, attention=(SITES[1],))))
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(plain), strict=True))


def test_graphs_of_another_runtime_refuse_the_model() -> None:
    model, _ = installed()
    with pytest.raises(UnsupportedError, match="Denoiser does not run as an OpenVINO graph: its attention is reused"):
        refuse_model(model)


def test_removal_leaves_nothing_behind() -> None:
    model, reuse = installed()
    outputs(model)
    reuse.remove()
    assert HOOKS not in vars(model) and not model._forward_pre_hooks and not model.places[0]._forward_pre_hooks
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(Denoiser()), strict=True))


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_copies_start_over_and_count_alone(twin_of: Any) -> None:
    model, reuse = installed()
    model.reuse = reuse
    expected = outputs(model)
    before = reuse.counts()
    outputs(model, (9.0,))
    twin = twin_of(model)
    assert torch.equal(outputs(twin, (7.0,))[0], outputs(Denoiser(), (7.0,))[0])  # nothing is kept of the original's clip
    assert all(torch.equal(a, b) for a, b in zip(outputs(twin), expected, strict=True))
    assert twin.reuse.counts() != before and twin.reuse.counts()["reused"] == before["reused"]
    twin.reuse.remove()
    assert HOOKS not in vars(twin) and HOOKS in vars(model)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "places"])
def test_compiled_models_reuse_the_same_way(whole: bool, order: int) -> None:
    model, reuse = installed({"on": "*", "mode": "share", "order": order})
    expected, counts = outputs(model), reuse.counts()
    reuse.reset()
    torch._dynamo.reset()
    if whole:
        model.compile(backend="aot_eager")
    else:
        for place in model.places:
            place.compile(backend="aot_eager")
    for found, one in zip(outputs(model), expected, strict=True):
        torch.testing.assert_close(found, one)
    assert reuse.counts() == counts


@torch.no_grad()
def test_rounded_attention_is_reused_and_follows_its_own_rules() -> None:
    numbers = AttentionQuant("int8")
    model, plain = Denoiser(), Denoiser()
    round_attention(model, numbers)
    stage = AttentionReuse()
    reuse = stage.install(model, stage.facts(work(model)))
    round_attention(plain, numbers)
    found, expected = outputs(model), outputs(plain)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2]) and not torch.equal(found[1], expected[1])
    assert reuse.rounded is not None and reuse.rounded.calls == {REFERENCE.name: 6} and PROTECTED not in reuse.rounded.calls
    round_attention(model, None)
    assert torch.equal(outputs(model)[0], outputs(Denoiser())[0])


# --- choosing -----------------------------------------------------------------------------------------------------------------------


def measured(error: float, made: int) -> Measured:
    one = Measured()
    one.error, one.power, one.made, one.every = error**2, 1.0, made, 100
    return one


def test_the_cheapest_mode_below_the_threshold_is_taken() -> None:
    """Mode 0 is free and gets worse with every step behind the computed one; mode 1 costs a quarter. Limits: 0.025, 0.05, 0.075, 0.1."""
    errors = {(1, 1): (0.01, 0.005), (2, 2): (0.06, 0.04), (3, 3): (0.3, 0.08), (4, 1): (0.05, 0.01)}
    found = {("a", step, mode, behind): measured(both[mode], 25 * mode) for (step, behind), both in errors.items() for mode in (0, 1)}
    assert chosen(found, "a", 5, 2, 0.1, 4) == [-1, 0, 1, -1, 0]
    assert chosen(found, "a", 5, 2, 0.1, 1) == [-1, 0, -1, -1, 0]
    found["a", 1, 0, 1].missing = 1
    assert chosen(found, "a", 2, 2, 0.1, 4) == [-1, 1]


@torch.no_grad()
def test_chosen_modes_are_those_whose_error_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places 0 and 2 see other latents at every step, place 1 always the same: sharing it costs nothing."""

    class Constant(Attends):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(latents(1.0).expand_as(x))

    model = Denoiser()
    model.places[1] = Constant()
    times, stage = (9.0, 7.0, 5.0, 3.0), AttentionReuse(threshold=0.05, candidates=({"mode": "window"}, {"mode": "share"}), longest=2)
    one = work(model)
    one.steps, one.timed, one.held_out_latents = 4, lambda *_: _Nothing(), lambda: outputs(model, times)
    facts = stage.facts(one)
    assert facts["timesteps"] == list(times)
    assert facts["table"] == {"places.0": [-1] * 4, "places.1": [-1, 1, 1, -1], "places.2": [-1] * 4}
    assert HOOKS not in vars(model)
    reuse = stage.install(model, facts)
    assert reuse.parts == ["places.1"]
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, times), outputs(plain_like(model), times), strict=True))
    assert reuse.counts()["reused"] * 6 == reuse.counts()["computed"] * 1.2


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


def plain_like(model: Denoiser) -> Denoiser:
    plain = Denoiser()
    plain.places[1] = type(model.places[1])()
    return plain


def test_a_table_serves_samplers_with_other_steps() -> None:
    share = Share()
    table = ByTable((9.0, 7.0, 5.0, 3.0), (None, share, None, share))
    assert table.modes == (share,)

    def course(*times: float) -> list[bool]:
        trajectory, found = Trajectory(times[0], torch.zeros(1)), []
        for number, time in enumerate(times):
            assert not number or trajectory.goes_on(time, torch.full((1,), time))
            found.append(table.mode(trajectory) is share)
        return found

    assert course(9.0, 7.0, 5.0, 3.0) == [False, True, False, True]
    assert course(9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0) == [False, False, True, True, False, False, True]
    assert course(7.0, 3.0) == [False, False]  # the step at 5 was to be computed in between


# --- a budget -----------------------------------------------------------------------------------------------------------------------


def recorded(grams: dict[str, Any], steps: int = 6) -> Recorded:
    return Recorded(tuple(float(steps - step) for step in range(steps)), grams, {"a": 3.0, "b": 1.0})


def products(values: Any) -> Any:
    return np.asarray(values, float) @ np.asarray(values, float).T


WALK = np.random.default_rng(0).normal(size=(6, 40)).cumsum(0)


def share_of(rows: dict[str, Any], cost: dict[str, float]) -> float:
    return sum(cost[name] * sum(cell is None for cell in row) for name, row in rows.items()) / (sum(cost.values()) * len(rows["a"]))


def test_a_plan_keeps_its_budget_and_computes_the_place_whose_errors_are_large() -> None:
    rows = plan(recorded({"a": products(WALK / 1000), "b": products(WALK)}), 0.5)
    assert share_of(rows, {"a": 3.0, "b": 1.0}) <= 0.5
    assert rows["b"] == (None,) * 6 and sum(cell is None for cell in rows["a"]) <= 2
    swapped = plan(recorded({"a": products(WALK), "b": products(WALK / 1000)}), 0.5)
    assert sum(cell is None for cell in swapped["b"]) < 6 == sum(cell is None for cell in rows["b"])


def test_the_schedule_of_a_price_is_the_best_of_all_schedules() -> None:
    found = recorded({"a": products(WALK)})
    known = pauses(found, "a", 1)

    def total(computed: tuple[int, ...], price: float) -> float:
        ends, value = [*computed[1:], 6], price * len(computed)
        for number, (last, end) in enumerate(zip(computed, ends, strict=True)):
            value += float(known[computed[max(number - 1, 0) : number + 1]].damage[end - last - 1])
        return value

    for price in (1.0, 20.0, 200.0):
        every = [(0, *rest) for count in range(6) for rest in itertools.combinations(range(1, 6), count)]
        best, computed = cheapest(known, 6, price)
        assert best == pytest.approx(min(total(one, price) for one in every)) == pytest.approx(total(computed, price))


def test_what_a_line_tells_is_forecast_without_error() -> None:
    line = np.arange(6)[:, None] * np.ones((1, 8)) + np.linspace(1, 9, 8)
    found = recorded({"a": products(line), "b": products(line)})
    known = pauses(found, "a", 1)
    assert known[0, 1].damage[-1] < 1e-3 * pauses(found, "a", 0)[(1,)].damage[-1]
    weights = forecasts(known, (0, 1), 6)[3]
    assert weights is not None and np.allclose(weights, (-2, 3), atol=0.1)


def test_a_budget_is_measured_planned_and_acts() -> None:
    model = Denoiser()

    @torch.no_grad()
    def sample() -> Tensor:
        return outputs(model, (9.0, 7.0, 5.0, 3.0))[-1]

    names = {"timestep": "timestep", "latent": "x"}
    found = record(work(model), names, sample)
    assert found.timesteps == (9.0, 7.0, 5.0, 3.0) and set(found.grams) == {"places.0", "places.1", "places.2"}
    plain = outputs(model, (9.0, 7.0, 5.0, 3.0))
    rows = plan(found, 0.5)
    stage = AttentionReuse(budget=0.5)
    facts = names | {"timesteps": list(found.timesteps), "forecasts": {site: [row and list(row) for row in rows[site]] for site in rows}}
    reuse = stage.install(model, facts)
    reused = outputs(model, (9.0, 7.0, 5.0, 3.0))
    counts = reuse.counts()
    assert counts["computed"] <= counts["reused"] and torch.equal(reused[0], plain[0])
    assert [reuse.by_cell()["places.0"][step][0] > 0 for step in range(4)] == [cell is None for cell in rows["places.0"]]
    reuse.remove()
    again = AttentionReuse(budget=1.0)
    everything = again.install(model, again.facts(work(model)))
    assert all(torch.equal(one, other) for one, other in zip(outputs(model, (9.0, 7.0, 5.0, 3.0)), plain, strict=True))
    everything.remove()
