"""Round one layer's weight or input, or those of all layers, at all steps or at some."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from reelquant._errors import RecipeError
from reelquant.allocate.sizes import check_weight
from reelquant.clock import ANY, FIRST, SECOND
from reelquant.damage.scene import Target
from reelquant.formats import FOUND_AT_RUN_TIME, QuantSpec, dynamic, fit, parse_format, parse_granularity

Steps = tuple[int, int] | None  # first and last; None for all
INPUT_GRAINS = ("tensor", "token", "sample", "channel")


def rounded_weight(target: Target, layer: str, written: str) -> Tensor:
    """The weight of a layer in a format, rounded to nearest with the range rule that the recipe gives this layer; its own dtype."""
    weight = target.module(layer).weight.detach()
    specs = target.plan.layers[layer].specs
    assert specs is not None
    spec = replace(specs.weight, **check_weight(written, "formats")._asdict(), alternatives=())
    return fit(spec, weight.float())(weight.float()).to(weight.dtype)


def input_rounding(target: Target, layer: str, written: str) -> Callable[[Tensor], Tensor]:
    """What rounds an input ``x`` of a layer to a format; the range is that of the input itself, lowest to highest value.

    A convolution has no scales per token: its input gets one for each item of the leading axis instead.
    """
    facts = target.plan.map.layers[layer]
    fmt, grain = check_input(written)
    grain = "sample" if grain == "token" and facts.channel_axis != -1 else grain
    spec = QuantSpec(fmt, parse_granularity(grain, facts.channel_axis), dynamic=True)
    return lambda x: dynamic(spec, x.float())(x.float()).to(x.dtype)


def check_input(written: str) -> tuple[Any, str]:
    """Read an input's format, ``int6/token``.

    Raises:
        RecipeError: if it is not written so, or no input can have it.
    """
    fmt, slash, grain = str(written).partition("/")
    if not slash or grain not in INPUT_GRAINS:
        raise RecipeError(
            f"formats of inputs are written FORMAT/GRANULARITY with {', '.join(INPUT_GRAINS)}, as in int6/token; got {written!r}"
        )
    return parse_format(fmt), grain


def own_inputs(target: Target, bits: Sequence[int]) -> tuple[str, ...]:
    """The recipe's own format of inputs with these numbers of bits; integers with a scale per token where it leaves inputs float."""
    specs = [row.specs.input for row in target.plan.quantized if row.specs and row.layer.role == "main"]
    spec = next((one for one in specs if one is not None), None)
    name, grain = ("int8", "token") if spec is None else (spec.format.name, spec.granularity.kind)
    family = re.match(r"u?int(?=\d+$)", name)
    known = grain if grain in (*FOUND_AT_RUN_TIME, "tensor", "channel") else "tensor"
    return tuple(f"{family.group() if family else 'int'}{count}/{known}" for count in bits)


def own_weights(target: Target, bits: Sequence[int]) -> tuple[str, ...]:
    """Integers of these numbers of bits in the granularity that the recipe gives most weights; scales of groups are floats."""
    grains = Counter(str(row.specs.weight.granularity) for row in target.plan.quantized if row.specs)
    grain = next((one for one, _ in grains.most_common()), "channel")
    return tuple(f"int{count}/{grain}" for count in bits)


def _within(step: int, steps: Steps) -> bool:
    return steps is None or steps[0] <= step <= steps[1]


@contextmanager
def weights_rounded(target: Target, weights: Mapping[str, Tensor], steps: Steps = None) -> Iterator[None]:
    """Inside, these layers have these weights, at these steps only; the target has to follow its calls for that."""
    modules = {name: target.module(name) for name in weights}
    kept = {name: module.weight.data for name, module in modules.items()}

    def put(values: Mapping[str, Tensor]) -> None:
        for name, module in modules.items():
            module.weight.data = values[name]

    handle = None
    if steps is None:
        put(weights)
    else:
        handle = target.denoiser.register_forward_pre_hook(lambda *_: put(weights if _within(target.step, steps) else kept))
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
        put(kept)


def input_of(args: Any, kwargs: Any) -> Any:
    """What a layer reads; motion modules of diffusers name it."""
    return args[0] if args else kwargs["input"]


def on_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Let a layer read what this makes of its input, whether it is given by place or by name."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, kwargs | {name: change(kwargs[name])}

    return module.register_forward_pre_hook(before, with_kwargs=True)


@contextmanager
def inputs_rounded(target: Target, formats: Mapping[str, str], steps: Steps = None) -> Iterator[None]:
    """Inside, these layers round what they read to these formats, at these steps only."""
    with ExitStack() as stack:
        for layer, written in formats.items():
            rounding = input_rounding(target, layer, written)

            def change(x: Tensor, rounding: Callable[[Tensor], Tensor] = rounding) -> Tensor:
                return rounding(x) if _within(target.step, steps) else x

            stack.callback(on_input(target.module(layer), change).remove)
        yield


@contextmanager
def weights_by_step(target: Target, formats: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Inside, the weights of these layers have the format of the step, one for each; the target has to follow its calls for that."""
    modules = {name: target.module(name) for name in formats}
    kept = {name: module.weight.data for name, module in modules.items()}
    known: dict[tuple[str, str], Tensor] = {}

    def put(*_: Any) -> None:
        for name, module in modules.items():
            written = formats[name][target.step]
            if (name, written) not in known:
                module.weight.data = kept[name]
                known[name, written] = rounded_weight(target, name, written)
            module.weight.data = known[name, written]

    handle = target.denoiser.register_forward_pre_hook(put)
    try:
        yield
    finally:
        handle.remove()
        for name, module in modules.items():
            module.weight.data = kept[name]


@contextmanager
def inputs_by_step(target: Target, formats: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Inside, these layers round what they read to the format of the step, one for each; the target has to follow its calls for that."""
    with ExitStack() as stack:
        for layer, written in formats.items():
            roundings = {one: input_rounding(target, layer, one) for one in set(written)}

            def change(x: Tensor, written: Sequence[str] = written, roundings: Mapping[str, Any] = roundings) -> Tensor:
                return roundings[written[target.step]](x)

            stack.callback(on_input(target.module(layer), change).remove)
        yield


@contextmanager
def outputs_disturbed(target: Target, power: float, seed: int, due: Callable[[], int | None]) -> Iterator[None]:
    """Inside, white noise is added to what the denoiser gives: ``power`` times the variance of each output.

    Args:
        due: asked after each call which rows are disturbed, see :func:`rows_of`; None leaves the call as it is.
    """
    generator = torch.Generator().manual_seed(seed)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        half = due()
        return None if half is None else disturbed(output, power, generator, half)

    handle = target.denoiser.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def disturbed(output: Any, power: float, generator: torch.Generator, half: int = ANY) -> Any:
    """A copy of an output with noise in the rows of a half of guidance."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf.device)
        made, rows = leaf.float().clone(), rows_of(half, len(leaf))
        made[rows] += noise[rows] * (power * leaf.float().var(correction=0)).sqrt()
        return made.to(leaf.dtype)

    return tree_map(one, output)


def rows_of(half: int, length: int) -> slice:
    """The rows of a leading axis that holds both halves of guidance; all rows for what is no half."""
    return {FIRST: slice(0, length // 2), SECOND: slice(length // 2, length)}.get(half, slice(0, length))
