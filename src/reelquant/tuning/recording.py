"""What a stretch of blocks gives at every step of a few trajectories, and what each step's error does to the final latents."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from reelquant._errors import SiteError, UnsupportedError, nearest
from reelquant._progress import Progress
from reelquant._remarks import remark
from reelquant.discover import denoisers_of, discover, plain
from reelquant.models.sampling import call_arguments, sample
from reelquant.reuse import BlockReuse, all_computed, installed_reuse, put, remove_reuse
from reelquant.reuse.plans import Errors
from reelquant.reuse.recorded import Results
from reelquant.sites import DenoiserMap
from reelquant.tuning.fresh_noise import noisy_steps
from reelquant.tuning.guided import guided_answers
from reelquant.tuning.shared import Together

LEAST_STEPS = 4  # of a denoiser: with fewer there is nothing to leave out


class Site(NamedTuple):
    """The denoiser that is tuned; what :meth:`reelquant.reuse.Reuse.facts` asks for.

    Attributes:
        denoiser: the module.
        component: its name in the pipeline.
        map: what discovery knows.
        others: further denoisers of the pipeline. Each has a schedule of its own, or none.
    """

    denoiser: nn.Module
    component: str
    map: DenoiserMap
    others: tuple[nn.Module, ...] = ()


def site_of(pipe: Any, component: str | None = None) -> Site:
    """The denoiser of a pipeline, or the one that is named.

    Raises:
        UnsupportedError: if there are several and none is named: each needs a schedule of its own.
        SiteError: if there is none of that name.
    """
    found = {name: plain(module) for name, module in denoisers_of(pipe).items()}
    if component is not None and component not in found:
        raise SiteError(f"{type(pipe).__name__} has no denoiser '{component}'; {nearest(component, tuple(found))}")
    if component is None and len(found) != 1:
        raise UnsupportedError(
            f"{type(pipe).__name__} has {len(found)} denoisers ({', '.join(found)}), each with a schedule of its own: name one "
            "(component=, --component), and tune the result for the next"
        )
    name = component or next(iter(found))
    denoiser = found.pop(name)
    return Site(denoiser, name, discover(denoiser), tuple(found.values()))


@contextmanager
def reusing(site: Site, stage: BlockReuse | None) -> Iterator[Any]:
    """Inside, the denoiser reuses as a stage says, and nothing else. Afterwards it reuses nothing.

    None for nothing: then the other denoisers reuse nothing either, inside. Else they do what they did.
    """
    remove_reuse(site.denoiser)
    if stage is None:
        with ExitStack() as computing:
            for other in site.others:
                computing.enter_context(all_computed(other))
            yield None
        return
    facts = stage.facts(site)  # type: ignore[arg-type]  (it asks for no more than a site has)
    put(site.denoiser, "blocks", stage, facts)
    try:
        yield installed_reuse(site.denoiser)["blocks"].installed
    finally:
        remove_reuse(site.denoiser)


@dataclass(frozen=True)
class Clips:
    """What some clips are made from.

    Attributes:
        prompts: a text or condition per clip.
        seeds: noise of each.
        call: arguments of the pipeline call.
    """

    prompts: Sequence[Any]
    seeds: Sequence[int]
    call: Mapping[str, Any] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        """The prompts in words, to tell them from others."""
        return [str(one) for one in self.prompts]

    def latents(self, pipe: Any, progress: Progress | None = None) -> Tensor:
        """The final latents, ``[clips, ...]`` float32."""
        told = {} if progress is None else {"on_step": progress.advance}
        return sample(pipe, self.prompts, seeds=self.seeds, batch=len(self.seeds), output="latent", **told, **self.call).float()

    def steps(self, pipe: Any) -> int:
        """Steps of a trajectory, for progress."""
        return int(call_arguments(pipe, **self.call).get("num_inference_steps") or 50)


@dataclass(frozen=True)
class Seconds:
    """Median seconds of a call of the denoiser, in which the stretch is computed and reused, and of a clip less all of its calls."""

    computed: float
    reused: float
    rest: float
    calls: int

    def outside(self, steps: int) -> float:
        """The share of a clip's time that is not spent in the denoiser, with everything computed."""
        return self.rest / (self.rest + self.calls * steps * self.computed)

    def speedup(self, steps: int, computed: int) -> float:
        """How many times faster a clip is made if the stretch is computed at so many steps."""
        return self.of_clip(steps, steps) / self.of_clip(steps, computed)

    def of_clip(self, steps: int, computed: int) -> float:
        """Seconds of a clip in which the stretch is computed at so many steps."""
        return self.rest + self.calls * (computed * self.computed + (steps - computed) * self.reused)


def timesteps_and_gram(
    pipe: Any, site: Site, stage: BlockReuse, clips: Clips, progress: Progress
) -> tuple[list[float], np.ndarray, Tensor]:
    """Sample with everything computed, and note what the stretch gives.

    Of a chain that is the change it makes, of other blocks the output of the last one, and of a whole answer what guidance makes of it,
    where the sampler says so (:class:`reelquant.tuning.guided.Guided`).

    Returns:
        The timesteps, the inner products ``[steps, steps]`` of what the stretch gave at them, and the final latents.

    Raises:
        UnsupportedError: if the sampler calls the denoiser in a way that nothing could be reused from step to step.
    """
    with reusing(site, stage) as installed:
        results = Results(installed.blocks[-1].name)
        installed.watch(results)
        progress.phase("record", clips.steps(pipe))
        with noisy_steps(pipe.scheduler) as drawn, guided_answers(pipe.scheduler) as answers:
            latents = clips.latents(pipe, progress)
    times = results.times
    steps = len(times)
    wanted = clips.steps(pipe)
    if site.others and steps < LEAST_STEPS:
        raise UnsupportedError(
            f"'{site.component}' runs at {steps} of the {wanted} steps, and with fewer than {LEAST_STEPS} nothing can be left out; make "
            "clips in more steps, or leave it as it is"
        )
    if steps < min(3, wanted) or sorted(times) != list(range(steps)):
        raise UnsupportedError(
            f"{type(pipe.scheduler).__name__} calls the denoiser in {wanted} steps of which {steps} follow each other: nothing can be "
            "reused from step to step; choose a sampler that calls it once a step, with falling timesteps"
        )
    if noisy := sum(drawn[: wanted - 1]):  # of one run; the last step may well add none
        remark(
            f"{type(pipe.scheduler).__name__} adds fresh noise at {noisy} of {wanted} steps: what was computed at one step says less about "
            "the next, so expect to leave out few; a sampler without fresh noise lets you leave out more"
        )
    timesteps = [times[step] for step in range(steps)]
    guided = None if stage.stretch else answers.gram(timesteps)
    return timesteps, results.gram() if guided is None else guided, latents


def single(timesteps: Sequence[float], step: int, stage: BlockReuse, order: int = 0) -> BlockReuse:
    """A stage that computes all steps but one."""
    kept = tuple(time for number, time in enumerate(timesteps) if number != step)
    return BlockReuse(at=kept, stretch=stage.stretch, order=order)


def record(
    pipe: Any,
    site: Site,
    stretch: tuple[float, ...],
    clips: Clips,
    progress: Progress,
    done: Callable[[int], float | None],
    keep: Any,
    shared: Together | None = None,
    further: Sequence[Clips] = (),
) -> tuple[Errors, Seconds]:
    """Record trajectories, and measure what reusing each single step does to the final latents.

    Args:
        done: the damage of a step that an earlier run measured, or None.
        keep: called with the number of a step and its damage, in the process that writes.
        shared: processes that measure some of the steps each.
        further: clips that only inner products are taken of; these take one sampling, and damages one for every step.

    Returns:
        What schedules are planned with, and what a call of the denoiser takes.
    """
    always = BlockReuse(every=1, stretch=stretch)
    timesteps, gram, latents = timesteps_and_gram(pipe, site, always, clips, progress)
    for more in further:
        gram = gram + timesteps_and_gram(pipe, site, always, more, progress)[1]
    flat, shared = Errors(timesteps, gram, np.ones(len(timesteps))), shared or Together()
    weight = np.zeros(len(timesteps))
    progress.phase("errors of single steps", len(timesteps) - 1)

    def measured(number: int) -> float:
        damage = done(number + 1)
        if damage is None:
            with reusing(site, single(timesteps, number + 1, always)):
                damage = _damage(clips.latents(pipe), latents)
            if shared.first:
                keep(number + 1, damage)
        progress.advance()
        return damage

    for step, damage in enumerate(shared.each("errors", len(timesteps) - 1, measured), 1):
        weight[step] = damage / max(float(flat.of((step - 1,), [step])[0]), 1e-30)
        if shared.first and done(step) is None:
            keep(step, damage)
    spent = shared.once("seconds", lambda: asdict(_seconds(pipe, site, always, clips, timesteps)))
    return Errors(timesteps, gram, weight, fitted=True), Seconds(**spent)


def _damage(found: Tensor, wanted: Tensor) -> float:
    """Squared error over the mean square, of a typical clip: the geometric mean. A mean would be that of the most sensitive clip."""
    errors = (found - wanted).square().flatten(1).mean(1) / wanted.square().flatten(1).mean(1)
    return float(errors.clamp(min=1e-20).log().mean().exp())


def _seconds(pipe: Any, site: Site, always: BlockReuse, clips: Clips, timesteps: Sequence[float]) -> Seconds:
    """Time one clip in which every second step is reused, and what lies outside of the denoiser."""
    one = Clips(clips.prompts[:1], clips.seeds[:1], clips.call)
    spent: dict[bool, list[float]] = {True: [], False: []}
    before = time.perf_counter()

    def start(*_: Any) -> None:
        nonlocal before
        _synchronize(site.denoiser)
        before = time.perf_counter()

    with reusing(site, BlockReuse(every=2, first=2, stretch=always.stretch)) as installed:
        counted = installed.counts()["reused"]

        def stop(*_: Any) -> None:
            nonlocal counted
            _synchronize(site.denoiser)
            now = installed.counts()["reused"]
            spent[now > counted].append(time.perf_counter() - before)
            counted = now

        handles = [site.denoiser.register_forward_pre_hook(start), site.denoiser.register_forward_hook(stop)]
        try:
            began = time.perf_counter()
            sample(pipe, one.prompts, seeds=one.seeds, **one.call)
            whole = time.perf_counter() - began
        finally:
            for handle in handles:
                handle.remove()
    calls = sum(map(len, spent.values()))
    rest = max(whole - sum(map(sum, spent.values())), 0.0)
    computed = statistics.median(spent[False])
    reused = statistics.median(spent[True]) if spent[True] else computed
    return Seconds(computed, reused, rest, max(1, round(calls / len(timesteps))))


def _synchronize(module: nn.Module) -> None:
    """Wait for a GPU, so that times are those of the work."""
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.device.type == "cuda":
        torch.cuda.synchronize(parameter.device)
