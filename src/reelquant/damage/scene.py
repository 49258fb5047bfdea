"""What sensitivity is measured on: a float pipeline, its denoisers, a few clips, and the calls that these make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._errors import CalibrationError
from reelquant._progress import Progress
from reelquant.allocate.table import LayerFacts
from reelquant.clock import BOTH, FIRST, SECOND
from reelquant.discover import component_of, plain
from reelquant.engine.calibration import STEPS
from reelquant.engine.plan import Plan
from reelquant.engine.recorder import half_reader, timestep_reader_of
from reelquant.models.sampling import call_arguments, sample
from reelquant.nn import get_module
from reelquant.observe import RecordedCall, Recording, time_of
from reelquant.sites import DenoiserMap

HALVES = {"first": FIRST, "second": SECOND}
SEED = 1_000  # of the noise of the first clip
BATCH = 4  # clips per call of the pipeline, at most


@dataclass(eq=False)
class Target:
    """A denoiser, and where its sampler is.

    Attributes:
        component: its name in the pipeline.
        denoiser: the module.
        plan: what the recipe says of its layers; ranges and inputs are taken from there.
        layers: those that the recipe quantizes, in execution order.
        timesteps: of its calls, in sampling order.
        calls: recorded calls, with outputs.
        step: index of the step of the present call.
        half: which half of guidance the present call computes, as :mod:`reelquant.clock` numbers them.
        halves: whether guidance has two halves, in one call or in two.
    """

    component: str
    denoiser: nn.Module
    plan: Plan
    layers: tuple[LayerFacts, ...]
    timesteps: list[float] = field(default_factory=list)
    calls: Sequence[RecordedCall] = ()
    step: int = 0
    half: int = FIRST
    halves: bool = False

    @classmethod
    def of(cls, pipe: Any, component: str, plan: Plan) -> Target:
        """The target of a plan."""
        quantized = {row.layer.name for row in plan.quantized}
        layers = tuple(layer for layer in layers_of(component, plan.map) if layer.name in quantized)
        return cls(component, plain(component_of(pipe, component)), plan, layers)

    def module(self, layer: str) -> Any:
        """The float layer of that name."""
        return get_module(self.denoiser, layer)

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Inside, :attr:`step` and :attr:`half` follow the calls; steps that were never seen are added."""
        time_at = timestep_reader_of(self.denoiser, self.plan.map.timestep_argument or "timestep")
        half_of = half_reader(self.denoiser, self.plan)

        def follow(module: nn.Module, args: Any, kwargs: Any) -> None:
            time = time_of(time_at(args, kwargs))
            if time not in self.timesteps:
                self.timesteps.append(time)
            self.step, self.half = self.timesteps.index(time), half_of(args, kwargs)
            self.halves = self.halves or self.half in (SECOND, BOTH)

        handle = self.denoiser.register_forward_pre_hook(follow, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def layers_of(component: str, map_: DenoiserMap) -> tuple[LayerFacts, ...]:
    """What a table says of the layers that run, in execution order."""
    cross = [f"{site.name}." for site in map_.attention if site.role == "cross" and site.name]
    found = []
    for layer in sorted(map_.layers.values(), key=lambda one: one.order):
        block = next((block for block in map_.blocks if layer.name.startswith(f"{block}.")), "")
        over_prompt = any(layer.name.startswith(start) for start in cross)
        if layer.order >= 0:
            found.append(LayerFacts(component, layer.name, layer.kind, layer.role, layer.shape, block, over_prompt, layer.last, layer.end))
    return tuple(found)


@dataclass(eq=False)
class Scene:
    """A pipeline in float with the clips that damages are measured on.

    Attributes:
        pipe: the pipeline.
        targets: its denoisers.
        prompts: a text or condition per clip.
        call: arguments of the pipeline call.
        progress: hears of every unit of work.
        seed: of the noise of the first clip.
        reference: final latents of the float pipeline, ``[clips, ...]``.
        found: those that :meth:`damages` sampled last.
    """

    pipe: Any
    targets: Sequence[Target]
    prompts: Sequence[Any]
    call: Mapping[str, Any]
    progress: Progress
    seed: int = SEED
    reference: Tensor = field(default_factory=lambda: torch.empty(0))
    found: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def steps(self) -> int:
        """Steps of the sampler."""
        return int(call_arguments(self.pipe, **self.call).get("num_inference_steps") or STEPS)

    def latents(self, **told: Any) -> Tensor:
        """Final latents ``[clips, ...]`` float32 of the pipeline as it is now."""
        seeds = range(self.seed, self.seed + len(self.prompts))
        return sample(self.pipe, self.prompts, seeds=seeds, batch=BATCH, output="latent", **told, **self.call).float()

    def with_gradients(self, clip: int) -> Tensor:
        """Final latents of one clip, with the graph that made them: pipelines and :func:`sample` switch gradients off around themselves."""
        owner = next(kind for kind in type(self.pipe).__mro__ if "__call__" in kind.__dict__)
        guarded = owner.__dict__["__call__"]
        owner.__call__ = getattr(guarded, "__wrapped__", guarded)
        try:
            with torch.enable_grad():
                sampled = sample.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
                return sampled(self.pipe, [self.prompts[clip]], seeds=[self.seed + clip], first=clip, output="latent", **self.call).float()
        finally:
            owner.__call__ = guarded

    def damages(self) -> list[float]:
        """Squared error of the final latents over their variance, of every clip, as the pipeline is now.

        Raises:
            CalibrationError: if they are not finite.
        """
        self.found = self.latents()
        errors = (self.found - self.reference).square().flatten(1).mean(1)
        damages = (errors / self.reference.flatten(1).var(1, correction=0).clamp(min=1e-20)).clamp(min=1e-20)
        if not bool(damages.isfinite().all()):
            raise CalibrationError("the clips hold NaN or inf with the format that is measured; take it out of the formats")
        return damages.tolist()

    def record(self) -> None:
        """Sample the float pipeline once: its latents, its timesteps, every call of its denoisers, and what its layers multiply.

        Raises:
            CalibrationError: if a denoiser is never called.
        """
        recordings = {target.component: Recording() for target in self.targets}

        def hook(target: Target) -> Any:
            def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                recordings[target.component].append(RecordedCall(args, kwargs, output, target.step, target.half))

            return target.denoiser.register_forward_hook(see, with_kwargs=True)

        self.progress.phase("record", self.steps)
        with following(self.targets), ExitStack() as stack:
            for target in self.targets:
                stack.callback(hook(target).remove)
            counts = [stack.enter_context(counting(target)) for target in self.targets]
            self.reference = self.latents(on_step=self.progress.advance)
        for target, count in zip(self.targets, counts, strict=True):
            target.calls = recordings[target.component]
            runs = max(len(target.timesteps) * len(self.prompts), 1)
            target.layers = tuple(replace(layer, products=count[layer.name] / runs) for layer in target.layers)
            if not target.timesteps:
                raise CalibrationError(
                    f"'{target.component}' is never called in {self.steps} steps; take more steps, or leave it out with --component"
                )


@contextmanager
def counting(target: Target) -> Iterator[Counter[str]]:
    """Inside, multiplications of every layer are counted, in all calls together."""
    count: Counter[str] = Counter()
    with ExitStack() as stack:
        for layer in target.layers:

            def after(module: nn.Module, args: Any, output: Any, layer: LayerFacts = layer) -> None:
                if isinstance(output, Tensor):
                    count[layer.name] += output.numel() // layer.shape[0] * layer.weights

            stack.callback(target.module(layer.name).register_forward_hook(after).remove)
        yield count


@contextmanager
def following(targets: Sequence[Target]) -> Iterator[None]:
    """Inside, every target knows the step and half of its calls."""
    if not targets:
        yield
        return
    with targets[0].followed(), following(targets[1:]):
        yield


def typical(damages: Sequence[float]) -> float:
    """Of a typical clip: the geometric mean. An arithmetic one would be that of the most sensitive clip."""
    return float(torch.tensor(damages, dtype=torch.float64).clamp(min=1e-20).log().mean().exp())
