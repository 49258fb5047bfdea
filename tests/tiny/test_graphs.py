"""Quantized denoisers as one OpenVINO graph: the answers of the reference, whatever users do with a model, or a sentence that says no."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

import reelquant
from reelquant import RecipeError, UnsupportedError
from reelquant.kernels import backend
from reelquant.kernels.attention import AttentionQuant
from reelquant.nn import kernels_of, quantized_layers, set_attention
from reelquant.reuse import BlockReuse, installed_reuse, put, remove_reuse
from tests.tiny import bundled
from tests.tiny.bundled import CPU, PIPELINES, denoiser

openvino = pytest.importorskip("openvino", reason="pip install openvino", exc_type=ImportError)

from reelquant import graphs  # noqa: E402
from reelquant.graphs import runner  # noqa: E402

Call = tuple[tuple[Any, ...], dict[str, Any]]
NOISE = 1e-5  # relative, on an input: what other orders of sums add up to; enough for some codes to turn, whatever the processor


def calls_of(pipe: Any) -> list[Call]:
    """Arguments of every call in a short clip."""
    seen: list[Call] = []
    model = denoiser(pipe)
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    bundled.latents(pipe)
    handle.remove()
    return seen


@pytest.fixture(scope="module", params=PIPELINES)
def running(request: pytest.FixtureRequest) -> tuple[Any, list[Call]]:
    """A bundled denoiser on the runtime, and calls of every step."""
    pipe = copy.deepcopy(bundled.quantized(request.param))
    calls = calls_of(pipe)
    reelquant.configure(pipe, runtime="openvino")
    return denoiser(pipe), calls


@pytest.fixture(scope="module")
def small() -> tuple[Any, list[Call]]:
    """Two blocks of ``tiny-dit`` on the runtime, with weights so narrow that every processor multiplies them as integers."""
    pipe = reelquant.open_pipeline("tiny-dit")
    pipe.transformer.blocks = pipe.transformer.blocks[:2]
    pipe.transformer.register_to_config(num_layers=2)
    weight = {"format": "int6", "granularity": "channel"}
    recipe = bundled.RECIPE | {"defaults": {"weight": weight, "input": {"format": "int8"}}, "rules": bundled.RECIPE["rules"][:1]}
    reelquant.quantize(pipe, recipe | {"temporal": "quantize"}, bundled.PROMPT, **bundled.CALL)
    bundled.quiet(pipe)
    calls = calls_of(pipe)
    reelquant.configure(pipe, runtime="openvino")
    return denoiser(pipe), calls


@torch.no_grad()
def answer(model: Any, call: Call) -> Tensor:
    return model(*call[0], **call[1])[0]


def by_the_oracle(model: Any, call: Call) -> Tensor:
    """What the reference kernels give."""
    for layer in quantized_layers(model).values():
        layer.release()
    with backend("reference"):
        found = answer(model, call)
    for layer in quantized_layers(model).values():
        layer.release()
    return found


def noisy(call: Call, seed: int) -> Call:
    """The same call, all floats of its tensors a little off, the timestep included: its features are rounded, too."""
    generator = torch.Generator().manual_seed(seed)
    args, kwargs = torch.utils._pytree.tree_map(
        lambda leaf: (
            leaf * (1 + NOISE * torch.randn(leaf.shape, generator=generator))
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
            else leaf
        ),
        call,
    )
    return args, kwargs


def floor_of(model: Any, call: Call, expected: Tensor) -> float:
    """How far the reference kernels come from their own answer where inputs are a little off."""
    return max(distance(by_the_oracle(model, noisy(call, seed)), expected) for seed in range(3))


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("tables", [True, False])
def test_every_step_is_as_near_to_the_reference_as_that_is_to_itself(running: tuple[Any, list[Call]], tables: bool) -> None:
    model, calls = running
    reelquant.configure(model, temporal_table=tables)
    try:
        for call in calls[:: max(len(calls) - 1, 1)]:  # the first and the last, of other timesteps
            expected = by_the_oracle(model, call)
            floor = floor_of(model, call, expected)
            assert 0 < floor < 0.1
            assert distance(answer(model, call), expected) < 2 * floor
    finally:
        reelquant.configure(model, temporal_table=True)


def test_layers_say_what_the_compiled_graph_computes_them_with(small: tuple[Any, list[Call]]) -> None:
    model, calls = small
    expected, found = by_the_oracle(model, calls[0]), answer(model, calls[0])
    assert distance(found, expected) < 2 * floor_of(model, calls[0], expected)
    facts = kernels_of(model)
    assert facts.names["openvino int8"] > 0.9 * sum(facts.names.values()) and set(facts.names) <= {runner.INTEGERS.name, runner.FLOATS.name}
    (compiled,) = vars(model)[runner.GRAPHS].kept.values()
    nodes = [node.get_rt_info() for graph in (compiled.once, compiled.main) for node in graph.get_runtime_model().get_ops()]
    integer = [node for node in nodes if node["primitiveType"].astype(str).lower().endswith("i8") and _multiplies(node)]
    assert len(integer) == facts.names["openvino int8"]


def _multiplies(node: Any) -> bool:
    return node["layerType"].astype(str) in ("FullyConnected", "MatMul", "Convolution")


def test_a_graph_is_made_once_per_form_and_few_are_kept(small: tuple[Any, list[Call]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = small
    made: list[Any] = []
    monkeypatch.setattr(runner, "trace", lambda *args: made.append(args) or "traced")
    monkeypatch.setattr(runner.Graphs, "_compiled", lambda *args: lambda slot, leaves: (leaves[0],))
    monkeypatch.setattr(runner, "_check", lambda *args: None)  # these graphs answer nothing
    monkeypatch.setattr(runner, "KEPT", 2)
    graphs.set_runtime(model, "openvino")
    (args, kwargs), wider = calls[0], calls[0][1] | {"hidden_states": torch.zeros(1, 8, 7, 8, 10)}
    for call in [(args, kwargs)] * 2 + [(args, wider)] * 2 + [(args, kwargs | {"return_dict": True})]:
        answer(model, call)
    assert len(made) == 3 and len(vars(model)[runner.GRAPHS].kept) == 2
    answer(model, (args, wider))
    assert len(made) == 3
    answer(model, (args, kwargs))  # the one that was used the longest time ago
    assert len(made) == 4
    graphs.set_runtime(model, "openvino")


def test_changed_numbers_and_prompts_are_noticed(small: tuple[Any, list[Call]]) -> None:
    model, calls = small
    args, kwargs = calls[0]
    prompt = kwargs["encoder_hidden_states"].clone()
    first = answer(model, (args, kwargs | {"encoder_hidden_states": prompt}))
    assert torch.equal(answer(model, (args, kwargs | {"encoder_hidden_states": prompt})), first)
    prompt.mul_(-1)  # in place, in the very tensor whose part is kept
    found = answer(model, (args, kwargs | {"encoder_hidden_states": prompt}))
    assert not torch.equal(found, first)
    assert torch.equal(found, answer(model, (args, kwargs | {"encoder_hidden_states": prompt.clone()})))
    bias = model.proj_out.bias
    with torch.no_grad():
        bias.add_(1)
        moved = answer(model, calls[0])
        bias.sub_(1)
    assert distance(moved, answer(model, calls[0])) > 0.1


def test_outputs_have_the_type_the_model_gives(small: tuple[Any, list[Call]]) -> None:
    model, calls = small
    args, kwargs = calls[0]
    with torch.no_grad():
        found = model(*args, **kwargs | {"return_dict": True})
    assert type(found).__name__ == "Transformer2DModelOutput" and torch.equal(found.sample, answer(model, calls[0]))


def test_threads_have_requests_of_their_own(small: tuple[Any, list[Call]]) -> None:
    model, calls = small
    expected = [answer(model, call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(lambda call: answer(model, call), calls * 3), expected * 3, strict=True):
            assert torch.equal(found, wanted)


def test_not_a_number_shows(small: tuple[Any, list[Call]]) -> None:
    model, calls = small
    args, kwargs = calls[0]
    broken = kwargs["hidden_states"].clone()
    broken[0, 0, 0, 0, 0] = torch.nan
    assert bool(answer(model, (args, kwargs | {"hidden_states": broken})).isnan().all())


def test_models_in_bfloat16_answer_in_bfloat16(small: tuple[Any, list[Call]]) -> None:
    model, calls = small
    half = nn.Module.to(copy.deepcopy(model), torch.bfloat16)
    args, kwargs = torch.utils._pytree.tree_map(
        lambda leaf: leaf.bfloat16() if isinstance(leaf, Tensor) and leaf.ndim > 2 else leaf, calls[0]
    )
    found = answer(half, (args, kwargs))
    assert found.dtype == torch.bfloat16
    assert distance(found.float(), answer(model, calls[0])) < 0.1  # 8 bits of mantissa, and codes that go the other way


def test_protected_steps_are_computed_in_torch(small: tuple[Any, list[Call]]) -> None:
    model, calls = small
    clock = model.reelquant_clock
    before = answer(model, calls[0])
    clock.protect(range(len(clock.timesteps)))
    try:
        found = answer(model, calls[0])
        with torch.no_grad():
            expected = type(model).forward(model, *calls[0][0], **calls[0][1])[0]
    finally:
        clock.protect(())
    assert torch.equal(found, expected) and not torch.equal(found, before)


@pytest.mark.parametrize("first", ["reuse", "graph"])
def test_a_reuse_of_whole_answers_stands_before_the_graph(small: tuple[Any, list[Call]], first: str) -> None:
    model, calls = copy.deepcopy(small[0]), small[1]
    now, next_step = calls[0], next(call for call in calls if call[1]["timestep"] != calls[0][1]["timestep"])
    found = answer(model, now)
    stage = BlockReuse(stretch=(), every=2)
    facts = {"blocks": [""], "keeps": "answer", "timestep": "timestep", "latent": "hidden_states"}
    if first == "reuse":
        runner.stop(model)
    put(model, "blocks", stage, facts)
    if first == "reuse":
        runner.start(model)
    assert all(torch.equal(answer(model, call), found) for call in (now, next_step))
    installed = installed_reuse(model)["blocks"].installed
    assert installed.counts() == {"computed": 1, "reused": 1}
    runner.stop(model)
    assert not torch.equal(answer(model, now), found) and installed.counts() == {"computed": 2, "reused": 1}  # layers, not the graph
    remove_reuse(model)
    assert "forward" not in vars(model)


def test_the_way_back_leaves_nothing(small: tuple[Any, list[Call]]) -> None:
    model = copy.deepcopy(small[0])
    graphs.set_runtime(model, "torch")
    assert "forward" not in vars(model) and runner.GRAPHS not in vars(model)
    assert not any(name.startswith("openvino") for name in kernels_of(model).names)
    graphs.set_runtime(model, "torch")


def test_a_dequantized_model_answers_with_its_float_layers(small: tuple[Any, list[Call]]) -> None:
    model, calls = copy.deepcopy(small[0]), small[1]
    model.dequantize()
    assert "forward" not in vars(model) and not quantized_layers(model)
    assert 0 < distance(answer(model, calls[0]), answer(small[0], calls[0])) < 0.3  # 6-bit weights of both, inputs rounded by one


def test_copying_and_saving_go_on_as_before(small: tuple[Any, list[Call]], tmp_path: Path) -> None:
    model, calls = small
    expected = answer(model, calls[0])
    twin = copy.deepcopy(model)
    assert torch.equal(answer(twin, calls[0]), expected)
    assert vars(twin)[runner.GRAPHS] is not vars(model)[runner.GRAPHS]
    model.save_pretrained(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    graphs.set_runtime(again, "openvino")
    assert torch.equal(answer(again, calls[0]), expected)


def adapted(model: Any) -> None:
    model.peft_config = {"style": object()}


def halved(model: Any) -> None:
    layer = next(iter(quantized_layers(model).values()))
    object.__setattr__(layer, "layout", type(layer.layout)(layer.layout.weight, layer.layout.input, cfg_halves=True))


OBSTACLES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "adapters": (adapted, r"it has adapters \(style\); unload them, merge them before quantizing"),
    "offloading": (lambda model: cpu_offload(model, CPU), "hooks that offload, cache or cast act on it; remove them"),
    "watched layers": (lambda model: model.blocks[0].ffn.register_forward_hook(print), "a hook watches 'blocks.0.ffn'"),
    "halves of guidance": (halved, "has input scales for each half of guidance"),
    "rounded attention": (
        lambda model: set_attention(model, AttentionQuant("int8")),
        r"its attention is asked for with int8 scores.*attention='float'",
    ),
    "another device": (lambda model: model.to("meta"), r"it lies on meta; move it with model.to\('cpu'\) first"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_graphs_cannot_do_is_refused_at_once(small: tuple[Any, list[Call]], obstacle: str) -> None:
    model = copy.deepcopy(small[0])
    graphs.set_runtime(model, "torch")
    make, message = OBSTACLES[obstacle]
    make(model)
    with pytest.raises(UnsupportedError, match=message):
        graphs.set_runtime(model, "openvino")
    assert runner.GRAPHS not in vars(model) and "openvino" not in str(kernels_of(model).names if obstacle != "another device" else "")


def test_what_comes_later_is_refused_in_the_call(small: tuple[Any, list[Call]]) -> None:
    model, calls = copy.deepcopy(small[0]), small[1]
    with pytest.raises(UnsupportedError, match="gradients are asked for"):
        model(*calls[0][0], **calls[0][1] | {"hidden_states": calls[0][1]["hidden_states"].clone().requires_grad_()})
    adapted(model)
    with pytest.raises(UnsupportedError, match="it has adapters"):
        answer(model, calls[0])
    del model.peft_config
    cpu_offload(model, CPU)
    with pytest.raises(UnsupportedError, match="offloading or caching was switched on"):
        answer(model, calls[0])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda out: out * 1.3, r"answers \d+% away from its layers"),
        (lambda out: out * torch.nan, "answers NaN or infinities where its layers do not"),
        (lambda out: out[:, :0], r"answers \[\[1, 0, .* instead of \[\[1, "),
    ],
)
def test_a_graph_that_answers_something_else_is_refused(
    small: tuple[Any, list[Call]], monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor], Tensor], words: str
) -> None:
    model, calls = copy.deepcopy(small[0]), small[1]
    graphs.set_runtime(model, "openvino")
    compiled = runner.Compiled.__call__
    monkeypatch.setattr(runner.Compiled, "__call__", lambda self, slot, leaves: (wrong(compiled(self, slot, leaves)[0]),))
    with pytest.raises(UnsupportedError, match=words):
        answer(model, calls[0])
    monkeypatch.undo()
    assert bool(answer(model, calls[0]).isfinite().all())  # compiled again, and kept now


def test_runtimes_are_known_by_name_and_package(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = bundled.quantized("tiny-dit")
    with pytest.raises(RecipeError, match="unknown runtime 'openvin'; did you mean 'openvino'"):
        reelquant.configure(pipe, runtime="openvin")
    monkeypatch.setattr(graphs, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'reelquant\[openvino\]'"):
        reelquant.configure(pipe, runtime="openvino")
    reelquant.configure(pipe, runtime="torch")
    with pytest.raises(UnsupportedError, match="holds no quantized denoiser"):
        reelquant.configure(nn.Sequential(next(iter(quantized_layers(denoiser(pipe)).values()))), runtime="torch")
