"""Drop blocks of a float denoiser: record, choose, remove, train, and keep what is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._errors import CalibrationError, RecipeError, UnsupportedError, nearest
from reelquant._progress import Progress, Silent
from reelquant.discover import denoisers_of, plain
from reelquant.models.pipelines import calibration_prompts
from reelquant.models.sampling import call_arguments
from reelquant.observe import RecordedCall
from reelquant.reconstruct.error import split
from reelquant.removal.chain import Chain
from reelquant.removal.distill import HELD_OUT, Distillation, mean_error, record
from reelquant.removal.kept import Kept

CLIPS = 8
"""Clips whose calls are recorded, where the caller gives no texts."""


@dataclass(frozen=True)
class Dropped:
    """What was dropped.

    Attributes:
        component: of the pipeline.
        blocks: numbers of the blocks that are gone, in the chain as it was.
        setting: of the config, which says how many are left.
        left: how many are left.
        parameters: of the denoiser, before and after.
        error: squared error over variance of the output on held-out calls, unitless: without these blocks, and after training. The second
            is the first if training did not lower it, and its weights were dropped again.
    """

    component: str
    blocks: tuple[int, ...]
    setting: str
    left: int
    parameters: tuple[int, int]
    error: tuple[float, float]


def drop(
    pipe: Any,
    blocks: int | Sequence[int] = 1,
    *,
    choose: str = "measured",
    prompts: Sequence[Any] | None = None,
    calls: int = 64,
    how: Distillation | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    work: Path | None = None,
    **call: Any,
) -> Dropped:
    """Drop blocks of a pipeline's denoiser in place, and train the others on what it gave; see :func:`reelquant.drop_blocks`.

    Args:
        work: a folder for what a run that is stopped goes on from; the caller removes it.
    """
    how, progress = how or Distillation(seed=seed), progress or Silent()
    component, model = _denoiser(pipe)
    chain = Chain.of(model)
    count = len(chain.blocks)
    wanted = _checked(blocks, choose, count)
    if calls < HELD_OUT:
        raise CalibrationError(f"calls is at least {HELD_OUT}, of which one is held out, got {calls}")
    texts = list(calibration_prompts(pipe, CLIPS) if prompts is None else prompts)
    steps = call_arguments(pipe, **call).get("num_inference_steps") or 50
    settings = {"model": str(pipe.config.get("_name_or_path")), "blocks": blocks, "choose": choose, "calls": calls, "how": asdict(how)}
    kept = Kept(work, settings | {"seed": seed, "texts": [str(text) for text in texts], "call": call})

    def recorded() -> Sequence[RecordedCall]:
        progress.phase("record", -(-len(texts) // 4) * steps)
        return record(pipe, model, texts, calls, seed=seed, on_step=progress.advance, **call)

    calls_made = kept.calls(recorded)
    trained, held_out = split(len(calls_made))
    before, size = list(chain.blocks), _parameters(model)
    with _undone(lambda: chain.put(before)):
        gone = wanted if isinstance(wanted, tuple) else kept.choice(lambda: CHOICES[choose](chain, wanted, calls_made, held_out, progress))
        chain.keep([number for number in range(count) if number not in gone])
        error = mean_error(model, calls_made, held_out)
        after = _trained(chain, how, calls_made, trained, held_out, error, progress, kept) if how.iterations else error
    return Dropped(component, gone, chain.setting, len(chain.blocks), (size, _parameters(model)), (error, after))


def _denoiser(pipe: Any) -> tuple[str, nn.Module]:
    found = denoisers_of(pipe)
    if len(found) != 1:
        raise UnsupportedError(f"{type(pipe).__name__} has {len(found)} denoisers ({', '.join(found)}), and blocks are dropped of one")
    ((component, module),) = found.items()
    return component, plain(module)


def _checked(blocks: int | Sequence[int], choose: str, count: int) -> int | tuple[int, ...]:
    """How many blocks go, or which.

    Raises:
        RecipeError: for numbers that the chain does not have, or an unknown way to choose.
    """
    if choose not in CHOICES:
        raise RecipeError(f"blocks cannot be chosen by '{choose}'; {nearest(choose, CHOICES)}")
    if isinstance(blocks, int):
        if not 0 < blocks < count:
            raise RecipeError(f"of {count} blocks 1 to {count - 1} can be dropped, got {blocks}")
        return blocks
    gone = tuple(sorted(set(blocks)))
    if not gone or len(gone) < len(blocks) or len(gone) == count or any(number not in range(count) for number in gone):
        raise RecipeError(f"blocks are numbers from 0 to {count - 1}, each once and not all of them, got {list(blocks)}")
    return gone


@contextmanager
def _undone(undo: Callable[[], None]) -> Any:
    try:
        yield
    except BaseException:
        undo()
        raise


def _trained(
    chain: Chain,
    how: Distillation,
    calls: Sequence[RecordedCall],
    trained: Sequence[int],
    held_out: Sequence[int],
    error: float,
    progress: Progress,
    kept: Kept,
) -> float:
    """The error after training; the weights are as before if it is not lower, or if training fails."""
    before = {name: value.clone() for name, value in chain.blocks.state_dict().items()}
    progress.phase("train", how.iterations)
    with _undone(lambda: _restore(chain.blocks, before)):
        how.train(chain.model, chain.blocks, calls, trained, progress.advance, kept)
        after = mean_error(chain.model, calls, held_out)
    if after < error:
        return after
    _restore(chain.blocks, before)
    return error


@torch.no_grad()
def _restore(module: nn.Module, state: dict[str, Tensor]) -> None:
    for name, value in module.state_dict().items():
        value.copy_(state[name])


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


Choice = Callable[[Chain, int, Sequence[RecordedCall], Sequence[int], Progress], tuple[int, ...]]


def _measured(chain: Chain, wanted: int, calls: Sequence[RecordedCall], numbers: Sequence[int], progress: Progress) -> tuple[int, ...]:
    """One block after the other: the one without which the output changes least."""
    every, gone = list(chain.blocks), []
    progress.phase("choose blocks", sum(len(every) - done for done in range(wanted)))
    try:
        for _ in range(wanted):
            errors = {}
            for number in (one for one in range(len(every)) if one not in gone):
                chain.put([block for place, block in enumerate(every) if place not in (*gone, number)])
                errors[number] = mean_error(chain.model, calls, numbers)
                progress.advance()
            gone.append(min(errors, key=lambda number: errors[number]))
    finally:
        chain.put(every)
    return tuple(sorted(gone))


def _shallow(chain: Chain, wanted: int, *_: Any) -> tuple[int, ...]:
    """Those behind the first block."""
    first = min(1, len(chain.blocks) - wanted)
    return tuple(range(first, first + wanted))


def _deep(chain: Chain, wanted: int, *_: Any) -> tuple[int, ...]:
    """Those before the last block."""
    last = max(len(chain.blocks) - 1, wanted)
    return tuple(range(last - wanted, last))


CHOICES: dict[str, Choice] = {"measured": _measured, "shallow": _shallow, "deep": _deep}
"""How blocks are chosen, if their numbers are not given."""
