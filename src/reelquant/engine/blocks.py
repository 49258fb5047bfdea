"""Stages that work on a block: its recorded calls, a copy of it to work on, and what becomes of the codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from reelquant.engine.build import BuiltGroup, GroupWork, build_layer, finish_layer, prepare_group
from reelquant.engine.choice import Choice
from reelquant.engine.recorded import replay
from reelquant.engine.resampled import record_again
from reelquant.engine.search import Assignment, family
from reelquant.engine.session import Session
from reelquant.nn import QuantLayer, get_module, stock_attention
from reelquant.observe import RecordedCall
from reelquant.recipes.entry import Entry
from reelquant.reuse import all_computed
from reelquant.stages import BlockWork, LayerWork, Solution

NAMED = 3
"""How many parts a warning names."""


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer of a block while the block is solved."""

    built: BuiltGroup
    shared: GroupWork
    work: LayerWork
    choice: Choice


def solve_blocks(session: Session, assignment: Assignment, groups: Sequence[BuiltGroup]) -> None:
    """Let every stage that works on blocks improve the codes of ``groups``, unit by unit in execution order."""
    for entry in session.plan.acting("solve_block"):
        units = session.plan.parts(entry)
        calls = record_again(session, entry, groups) if entry.stage.resamples else session.calls
        told: dict[str, list[str]] = {}
        with session.timed(f"{entry.axis}: {entry.name}", len(units)):
            for unit in units:
                for sentence in _solve_unit(session, entry, unit, assignment, groups, calls):
                    told.setdefault(sentence, []).append(unit or "the denoiser")
                session.advance()
        session.warnings += [_summary(sentence, those, len(units)) for sentence, those in told.items()]


def _summary(sentence: str, units: Sequence[str], total: int) -> str:
    """One warning for all units that a stage says the same of."""
    more = f" and {len(units) - NAMED} more" if len(units) > NAMED else ""
    return f"{len(units)} of {total} parts: {sentence} ({', '.join(units[:NAMED])}{more})"


def _solve_unit(
    session: Session, entry: Entry, unit: str, assignment: Assignment, groups: Sequence[BuiltGroup], calls: Sequence[RecordedCall]
) -> Sequence[str]:
    """Let a stage improve the codes of one unit: the warnings that it gave."""
    names = session.plan.touched(entry, unit)
    rows = session.plan.quantized
    picked = sorted((name, choice.digest(rows)) for name, choice in assignment.items())
    key = ("block", entry.position, entry.name, unit, names, repr(entry.stage), picked)
    if (done := session.store.known(key, groups)) is not None:
        return done["warnings"]
    told: list[str] = []
    with session.having(groups):
        module = session.store.copy(unit)
    layers = _layers(session, assignment, groups, names)
    layers = {name: _as_it_is(layer, get_module(module, _inside(unit, name))) for name, layer in layers.items()}
    block = BlockWork(
        unit,
        module,
        {_inside(unit, name): layer.work for name, layer in layers.items()},
        _calls(session, unit, groups, calls),
        session.clock,
        session.seed,
        told.append,
    )
    for path, part in module.named_modules():
        if isinstance(part, QuantLayer):
            part.follow(session.clock, ".".join(one for one in (unit, path) if one))
    with all_computed(module):
        solutions = entry.stage.solve_block(block)
    for path, solution in solutions.items():
        name = ".".join(part for part in (unit, path) if part)
        _take(session, name, layers[name], solution, key)
    session.store.remember(key, {"warnings": told})
    return told


def _inside(unit: str, name: str) -> str:
    """The path of a layer inside of a unit."""
    return name.removeprefix(unit).removeprefix(".")


def _as_it_is(layer: _Layer, module: nn.Module) -> _Layer:
    """The layer with the scales of its input and the tensors of its branches that an earlier stage may have changed."""
    scale, names = getattr(module, "input_scale", None), [name for _, tensors in layer.work.branches for name in tensors]
    known = {name: getattr(module, name) for name in names}
    return replace(layer, work=layer.work.with_input_scale(scale).with_branch_tensors(known))


def _layers(session: Session, assignment: Assignment, groups: Sequence[BuiltGroup], names: Sequence[str]) -> dict[str, _Layer]:
    """What the layers of a unit were made of, built again: keeping it for all layers would take three copies of the model."""
    context, layers = session.context(), {}
    for built in groups:
        wanted = [name for name in names if name in built.layers]
        if not wanted:
            continue
        choice = assignment[family(built.group)]
        shared = prepare_group(context, built.group, choice)
        for name in wanted:
            work = build_layer(context, shared, session.plan.layers[name], choice).work
            layers[name] = _Layer(built, shared, work, choice)
    return layers


def _calls(
    session: Session, unit: str, groups: Sequence[BuiltGroup], recorded: Sequence[RecordedCall]
) -> Callable[[bool], Sequence[RecordedCall]]:
    """The calls of a unit, replayed when a stage asks for them."""
    known: dict[bool, Sequence[RecordedCall]] = {}

    def floats() -> Sequence[RecordedCall]:
        with session.store.running(), stock_attention(session.denoiser):
            return replay(session.denoiser, unit, recorded, outputs=True)

    def quantized() -> Sequence[RecordedCall]:
        with session.having(groups), session.store.running():
            reached = replay(session.denoiser, unit, recorded, outputs=False)
        return _Paired(reached, calls(False))

    def calls(after_quantized: bool) -> Sequence[RecordedCall]:
        if after_quantized not in known:
            known[after_quantized] = quantized() if after_quantized else floats()
        return known[after_quantized]

    return calls


class _Paired(Sequence[RecordedCall]):
    """Arguments of one recording with the outputs of another."""

    def __init__(self, arguments: Sequence[RecordedCall], outputs: Sequence[RecordedCall]) -> None:
        self.arguments, self.outputs = arguments, outputs

    def __len__(self) -> int:
        return len(self.arguments)

    def __getitem__(self, number: Any) -> Any:
        return replace(self.arguments[number], output=self.outputs[number].output)


def _take(session: Session, name: str, layer: _Layer, solution: Solution, key: Any) -> None:
    """Pack a layer with its better codes."""
    row, module = session.plan.layers[name], session.float_layer(name)
    work = layer.work.with_input_scale(solution.input_scale).with_branch_tensors(solution.branches)
    work = replace(work, solution=solution)
    built = finish_layer(layer.shared, row, work, layer.choice, module)
    session.store.improved(layer.built, name, built, key)
