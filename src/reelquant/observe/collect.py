"""One sampling pass with hooks on the denoiser and on the layers whose inputs are observed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reelquant._errors import CalibrationError
from reelquant.clock import ANY
from reelquant.observe.call import Call
from reelquant.observe.input_statistics import InputStatistics


def time_of(timestep: Tensor | float | None) -> float:
    """The timestep of a call as a number; of several, the largest; 0 of a call without."""
    return 0.0 if timestep is None else float(torch.as_tensor(timestep).float().amax())


@dataclass
class Steps:
    """Where the sampler is.

    Attributes:
        timesteps: seen so far, in sampling order.
        current: index of the current timestep.
        part: number of the current sampler run.
        calls: of the denoiser so far.
        example: arguments of its first call.
        halves: its calls, counted by the half of a guidance pair that they compute.
    """

    timesteps: list[float] = field(default_factory=list)
    current: int = -1
    part: int = 0
    calls: int = 0
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    halves: Counter[int] = field(default_factory=Counter)

    def see(self, timestep: Tensor | float | None, part: int | None = None) -> None:
        """Count a call of the denoiser with this timestep; of several timesteps, with the largest.

        Without one, as encoders of pictures are called, every call is a run of its own.

        Args:
            part: number of the sampler run, where it is known; else a timestep that was seen before the present one begins the next.
        """
        value = time_of(timestep)
        if value not in self.timesteps:
            self.timesteps.append(value)
        index = self.timesteps.index(value)
        again = self.calls > 0 if timestep is None else index < self.current
        self.part = self.part + again if part is None else part  # back to an earlier step: the sampler started again
        self.current = index
        self.calls += 1


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def observe(
    denoiser: nn.Module,
    timestep_of: Callable[[tuple[Any, ...], dict[str, Any]], Any],
    watched: Mapping[str, InputStatistics],
    run: Callable[[], None],
    on_call: Callable[[Call], None] = lambda call: None,
    half_of: Callable[[tuple[Any, ...], dict[str, Any]], int] = lambda args, kwargs: ANY,
    probing: Callable[[], bool] = lambda: False,
    prepared: Container[str] = (),
    frames_of: Callable[[tuple[Any, ...], dict[str, Any]], int] = lambda args, kwargs: 1,
    part_of: Callable[[], int | None] = lambda: None,
    whole: bool = True,
) -> Steps:
    """Run the pipeline once and fill the statistics.

    Args:
        denoiser: the module that the sampler calls once or twice a step.
        timestep_of: reads the timestep out of ``(args, kwargs)`` of a denoiser call.
        watched: layer name -> statistics of its input.
        run: samples with the real pipeline.
        on_call: hears of every call of the denoiser, before it is made.
        half_of: which half of a guidance pair a denoiser call computes, as :mod:`reelquant.clock` numbers them.
        probing: whether the run that is going on samples probes.
        prepared: layers that change their input before they multiply; what they multiply is looked at.
        frames_of: how many frames the latents of a denoiser call have.
        part_of: the number of the sampler run that is going on, where it is known.
        whole: all runs are made here; else there may be none.

    Raises:
        CalibrationError: if the denoiser was never called, or an input was NaN or infinite.
    """
    steps, half, frames = Steps(), [ANY], [1]

    def here() -> Call:
        return Call(steps.current, steps.part, half[0], probing(), frames[0])

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        steps.see(timestep_of(args, kwargs), part_of())
        steps.example = steps.example or (args, kwargs)
        half[0], frames[0] = half_of(args, kwargs), frames_of(args, kwargs)
        steps.halves[half[0]] += 1
        on_call(here())

    with _hooks() as handles:
        handles.append(denoiser.register_forward_pre_hook(before, with_kwargs=True))
        handles += _looks(denoiser, watched, prepared, here)
        run()
    if whole and not steps.calls:
        raise CalibrationError(f"sampling never called the denoiser ({type(denoiser).__name__}): is it the pipeline's own module?")
    # The first step with NaN comes first, and the sort is stable: of the layers that broke at that step, the one that ran first.
    for statistics in sorted(watched.values(), key=lambda statistics: statistics.bad_from()):
        statistics.check(steps.timesteps)
    return steps


def observe_methods(
    model: nn.Module,
    methods: Iterable[str],
    watched: Mapping[str, InputStatistics],
    run: Callable[[], None],
    probing: Callable[[], bool] = lambda: False,
    prepared: Container[str] = (),
) -> Steps:
    """The same of a model without timesteps that is called by its methods: every call of one is a part, and all are of one step.

    Layers that never run have empty statistics.

    Args:
        model: for example an autoencoder.
        methods: names of those that it has are counted, ``decode`` for example.
        watched, run, probing, prepared: as in :func:`observe`.

    Raises:
        CalibrationError: if nothing ran, or an input was NaN or infinite.
    """
    steps = Steps([0.0], 0, -1)

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            steps.part, steps.calls = steps.part + 1, steps.calls + 1
            return method(*args, **kwargs)

        return call

    with _hooks() as handles:
        handles += [_Exchanged(model, name, counted(getattr(model, name))) for name in methods if hasattr(model, name)]
        handles += _looks(model, watched, prepared, lambda: Call(0, max(steps.part, 0), ANY, probing()))
        run()
    seen = [statistics for statistics in watched.values() if statistics.range.seen]
    if not seen:
        raise CalibrationError(f"sampling never called {type(model).__name__}: is it the pipeline's own module?")
    for statistics in seen:
        statistics.check(steps.timesteps)
    return steps


def _looks(
    model: nn.Module, watched: Mapping[str, InputStatistics], prepared: Container[str], call: Callable[[], Call]
) -> list[RemovableHandle | _Exchanged]:
    """Have the statistics updated by every input of their layers."""
    handles: list[RemovableHandle | _Exchanged] = []
    for name, statistics in watched.items():
        layer: Any = model.get_submodule(name)
        if name in prepared:  # its stock forward, which it calls in its own, ends in this
            handles.append(_Exchanged(layer, "_conv_forward", _seeing(layer._conv_forward, statistics, call)))
        else:
            handles.append(layer.register_forward_pre_hook(_before(statistics, call), with_kwargs=True))
    return handles


def _before(statistics: InputStatistics, call: Callable[[], Call]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if x.numel():  # pipelines call layers on no tokens at all where something optional was not given
            statistics.update(x, call())

    return hook


def _seeing(inner: Callable[..., Tensor], statistics: InputStatistics, call: Callable[[], Call]) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any) -> Tensor:
        if x.numel():
            statistics.update(x, call())
        return inner(x, *args)

    return forward


class _Exchanged:
    """A method of one module that another function stands for, until :meth:`remove`."""

    def __init__(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self.module, self.name, self.before = module, name, vars(module).get(name)
        object.__setattr__(module, name, function)

    def remove(self) -> None:
        """Put the method back."""
        if self.before is None:
            del vars(self.module)[self.name]
        else:
            object.__setattr__(self.module, self.name, self.before)


@contextmanager
def exchanged(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, this function stands for a method of one module."""
    handle = _Exchanged(module, name, function)
    try:
        yield
    finally:
        handle.remove()
