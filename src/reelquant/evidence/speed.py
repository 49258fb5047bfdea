"""Speed and memory of a quantized pipeline on this machine, measured in turns with the float one.

A machine that is shared or warms up changes all times of a minute, not the ratio of two runs that follow each other. So
both pipelines make the same clip in turns (A B, B A, A B ...), a speed-up is a ratio of two times of the same round,
and its median is reported. Peak memory is measured in a fresh process for each pipeline, because a process does not
give all its memory back.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from reelquant._errors import UnsupportedError, printable
from reelquant._markup import table
from reelquant._numbers import size
from reelquant._plugins import load_plugin, named
from reelquant._progress import Progress, Silent
from reelquant._version import __version__
from reelquant.discover import denoiser_of
from reelquant.discover.components import denoisers_of, plain
from reelquant.evidence.causes import refuse_pair
from reelquant.evidence.machine import machine, versions
from reelquant.graphs import check_runtime, set_runtime
from reelquant.kernels import native_float
from reelquant.models.condition import Condition, as_condition, fitted
from reelquant.models.defaults import missing
from reelquant.models.described import described, packed, unpacked
from reelquant.models.media import opened
from reelquant.models.pipelines import calibration_prompts, open_pipeline, pipeline_class
from reelquant.models.sampling import call_arguments, sample
from reelquant.nn import AttentionFacts, KernelFacts, attention_facts, kernels_of, quantized_layers

SEED = 50_000
VARIANTS = ("reference", "test")


@dataclass(frozen=True)
class Spread:
    """The median of some rounds, and the quartiles around it (with fewer than four rounds, the extremes)."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) > 3:
            low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        else:
            low, high = min(values), max(values)
        return cls(statistics.median(values), low, high)

    def text(self, digits: int = 2) -> str:
        """``1.93 (1.90 to 1.95)``."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True, repr=False)
class Benchmark:
    """What was measured.

    Attributes:
        speedup: how many times faster a whole clip is made, text to frames; 2 means in half the time.
        step_speedup: the same of one denoising step.
        seconds: of a whole clip, by variant (``reference``, ``test``).
        step_seconds: of one denoising step, by variant; empty for pipelines that do not report their steps.
        weight_bytes: parameters and buffers of the denoiser, by variant.
        peak_bytes: largest resident memory of a fresh process that opens the pipeline and makes the clip, less what the
            process took before it opened it; on a GPU the memory that torch allocated. By variant; empty if it was not
            measured.
        kernels: number of layers by the kernel that computes them.
        refused: why the best kernel does not compute a layer, by reason and number of layers.
        simulated: whether float arithmetic stands in for low-bit arithmetic anywhere.
        attention: what computed attention with few-bit operands, over all rounds; None if the pipeline asks for none.
        data: circumstances: names, dtype, device, threads, call, rounds, machine, versions.
    """

    speedup: Spread
    step_speedup: Spread | None
    seconds: dict[str, Spread]
    step_seconds: dict[str, Spread]
    weight_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    kernels: dict[str, int]
    refused: dict[str, int]
    simulated: bool
    attention: AttentionFacts | None
    data: dict[str, Any]

    def __repr__(self) -> str:
        return printable(f"Benchmark({self._title}: {self.speedup.text()} times as fast)")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        times = {"whole clip, s": (self.seconds, self.speedup), "one step, s": (self.step_seconds, self.step_speedup)}
        bytes_ = {"weights of the denoiser": self.weight_bytes, "peak memory": self.peak_bytes}
        rows = [
            (name, *(f"{by[variant].median:.3g}" for variant in VARIANTS), f"{ratio.text()} times as fast")
            for name, (by, ratio) in times.items()
            if ratio is not None
        ]
        rows += [
            (name, *(size(by[variant]) for variant in VARIANTS), f"{by['test'] / max(by['reference'], 1):.2f} of it")
            for name, by in bytes_.items()
            if by
        ]
        return table(self._title, rows, ("", "float", "quantized", "ratio"))

    @property
    def _title(self) -> str:
        test, reference = (self.data[side] for side in ("test", "reference"))
        return f"{test['name']} against {reference['name']} in {reference['short']} on {self.data['device']}"

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data; ``speedup_vs_<dtype>`` is the median of :attr:`speedup`."""
        ratio = self.peak_bytes["test"] / self.peak_bytes["reference"] if self.peak_bytes.get("reference") else None
        step = None if self.step_speedup is None else self.step_speedup.median
        short = {f"speedup_vs_{self.data['reference']['short']}": self.speedup.median, "step_speedup": step}
        return short | {"peak_memory_bytes": self.peak_bytes or None, "peak_memory_ratio": ratio} | asdict(self)


SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def benchmark(
    test: str,
    reference: str,
    *,
    rounds: int = 5,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    compiled: bool = False,
    runtime: str = "torch",
    memory: bool = True,
    prompt: str | Condition | None = None,
    variant: str | None = None,
    progress: Progress | None = None,
    **call: Any,
) -> Benchmark:
    """Time a quantized pipeline against the float one it was made from.

    Args:
        test, reference: bundled name, folder or hub id of the quantized and the float pipeline.
        rounds: clips that each makes, after one that is not counted.
        dtype: of the float pipeline, and of the float parts of the quantized one; by default
            :func:`reelquant.kernels.native_float`.
        device: where they run.
        compiled: both denoisers go through ``torch.compile(fullgraph=True)``.
        runtime: of the quantized denoisers, see :func:`reelquant.graphs.set_runtime`.
        memory: also measure peak memory, which opens each pipeline once more.
        prompt: the text, or a condition with whatever else the clip is made from; by default one of the pipeline's own texts.
        variant: of the reference's weight files, ``fp16``, if it has several.
        progress: receives the progress.
        call: arguments of the pipeline call (``num_inference_steps``, ``num_frames``, ``height`` ...).

    Raises:
        UnsupportedError: if ``test`` has no quantized layer, was not made from ``reference``, or does not run on that runtime.
        CheckpointError: if a pipeline cannot be opened.
    """
    check_runtime(runtime)
    refuse_pair(reference, test, variant)
    progress, dtype = progress or Silent(), dtype or native_float(torch.device(device).type)
    if isinstance(prompt, Condition):
        (whole,) = map(as_condition, fitted(pipeline_class(reference), [prompt]))
        prompt, call = whole.text or None, call | {name: opened(value) for name, value in whole.inputs.items()}
    task = _Task(test, reference, rounds, dtype, device, compiled, runtime, prompt, call, variant)
    timed = _timed(task, progress)
    task = replace(task, call=task.call | timed.bundled)
    peaks, failure = _peaks(task, timed.prompt, progress) if memory else ({}, None)
    return _benchmark(task, timed, peaks, failure)


@dataclass(frozen=True)
class _Task:
    """The arguments of :func:`benchmark`."""

    test: str
    reference: str
    rounds: int
    dtype: torch.dtype
    device: str
    compiled: bool
    runtime: str
    prompt: str | None
    call: dict[str, Any]
    files: str | None = None  # variant of the reference's weight files


@dataclass(frozen=True)
class _Timed:
    """What the pipelines showed while both were open.

    Attributes:
        seconds, step_seconds: of whole clips and of steps, a value per round, by variant.
        weight_bytes: of the denoiser, by variant.
        kernels, attention: what computed the quantized denoiser.
        prompt: the text of the clips.
        arguments: of the pipeline call.
        bundled: a picture or clip that comes with the library, where the pipeline needs one and none was given.
    """

    seconds: dict[str, list[float]]
    step_seconds: dict[str, list[float]]
    weight_bytes: dict[str, int]
    kernels: KernelFacts
    attention: AttentionFacts | None
    prompt: str
    arguments: dict[str, Any]
    bundled: dict[str, Any]


def _timed(task: _Task, progress: Progress) -> _Timed:
    """Open both pipelines and time them; both are closed on return, so that they do not count into later peaks."""
    pipes = _opened(task, progress)
    denoisers = {variant: denoiser_of(pipe) for variant, pipe in pipes.items()}
    if not quantized_layers(denoisers["test"][1]):
        raise UnsupportedError(
            f"'{task.test}' holds no quantized layer; give a folder that reelquant quantize wrote, then the float pipeline"
        )
    _put(pipes["test"], task.runtime)
    weights = {variant: _bytes(module) for variant, (_, module) in denoisers.items()}
    if task.compiled:
        for variant, (component, module) in denoisers.items():
            setattr(pipes[variant], component, torch.compile(module, fullgraph=True))
    prompt = task.prompt or calibration_prompts(pipes["reference"], 1)[0]
    bundled = {name: values[0] for name, values in missing(pipes["reference"], [prompt], task.call).items()}
    call = task.call | bundled
    times = _in_turns(pipes, prompt, task.rounds, task.device, progress, call)
    arguments = described(call_arguments(pipes["test"], **call))
    quantized = plain(denoisers["test"][1])
    return _Timed(
        seconds={variant: [seconds for seconds, _ in times[variant]] for variant in VARIANTS},
        step_seconds={variant: [step for _, step in times[variant] if step is not None] for variant in VARIANTS},
        weight_bytes=weights,
        kernels=kernels_of(quantized),
        attention=attention_facts(quantized),
        prompt=prompt,
        arguments={key: value for key, value in arguments.items() if isinstance(value, int | float | str)},
        bundled=bundled,
    )


def _opened(task: _Task, progress: Progress) -> dict[str, Any]:
    progress.phase("open", 2)
    pipes = {}
    for variant, model, files in zip(VARIANTS, (task.reference, task.test), (task.files, None), strict=True):
        pipes[variant] = open_pipeline(model, task.dtype, task.device, files)
        progress.advance()
    return pipes


def _benchmark(task: _Task, timed: _Timed, peaks: dict[str, int], failure: str | None) -> Benchmark:
    """Medians and quartiles of what was timed."""
    steps = timed.step_seconds
    return Benchmark(
        speedup=Spread.of(_ratios(timed.seconds)),
        step_speedup=Spread.of(_ratios(steps)) if steps["test"] else None,
        seconds={variant: Spread.of(values) for variant, values in timed.seconds.items()},
        step_seconds={variant: Spread.of(values) for variant, values in steps.items() if values},
        weight_bytes=timed.weight_bytes,
        peak_bytes=peaks,
        kernels=timed.kernels.names,
        refused=timed.kernels.refused,
        simulated=timed.kernels.simulated,
        attention=timed.attention,
        data=_circumstances(task, timed) | {"peak_memory_failed": failure},
    )


def _circumstances(task: _Task, timed: _Timed) -> dict[str, Any]:
    return {
        "test": {"name": task.test},
        "reference": {"name": task.reference, "short": SHORT[task.dtype]},
        "device": task.device,
        "compiled": task.compiled,
        "runtime": task.runtime,
        "threads": torch.get_num_threads(),
        "rounds": task.rounds,
        "prompt": timed.prompt,
        "call": timed.arguments,
        "machine": machine(),
        "versions": versions(),
        "tool_version": __version__,
    }


def _put(pipe: Any, runtime: str) -> None:
    """Let the quantized denoisers of a pipeline be run by a runtime."""
    check_runtime(runtime)
    for module in denoisers_of(pipe).values() if runtime != "torch" else ():
        if quantized_layers(module):
            set_runtime(module, runtime)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])


def _ratios(values: dict[str, list[float]]) -> list[float]:
    return [slow / fast for slow, fast in zip(values["reference"], values["test"], strict=True)]


def _in_turns(
    pipes: dict[str, Any], text: str, rounds: int, device: str, progress: Progress, call: dict[str, Any]
) -> dict[str, list[tuple[float, float | None]]]:
    """Seconds of a clip and of a step, a pair per round."""
    progress.phase("sample", len(pipes) * (rounds + 1))
    times: dict[str, list[tuple[float, float | None]]] = {variant: [] for variant in pipes}
    for number in range(rounds + 1):
        for variant in VARIANTS[:: -1 if number % 2 else 1]:
            found = _clip(pipes[variant], text, device, call)
            if number:  # the first round compiles, packs weights and fills caches
                times[variant].append(found)
            progress.advance()
    return times


def _clip(pipe: Any, text: str, device: str, call: dict[str, Any]) -> tuple[float, float | None]:
    """Seconds to make one clip, and the median seconds between the ends of its steps.

    The first step does not count: only the ends of steps are seen.
    """
    ends: list[float] = []

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    sample(pipe, [text], seed=SEED, on_step=lambda: ends.append(now()), **call)
    whole = now() - start
    steps = [after - before for before, after in pairwise(ends)]
    return whole, statistics.median(steps) if steps else None


# --- memory -----------------------------------------------------------------------------------------------------------


def _peaks(task: _Task, prompt: str, progress: Progress) -> tuple[dict[str, int], str | None]:
    """Peak memory, a process for each pipeline. On failure ``({}, reason)``, so that finished timings survive."""
    progress.phase("peak memory", 2)
    dtype = str(task.dtype).removeprefix("torch.")
    shared: dict[str, Any] = {"text": prompt, "dtype": dtype, "device": task.device, "plugins": named()}
    try:
        shared["call"] = packed(task.call)
    except TypeError as error:
        return {}, str(error)
    peaks = {}
    sides = (("reference", task.reference, "torch", task.files), ("test", task.test, task.runtime, None))
    for variant, model, runtime, files in sides:
        done = subprocess.run(
            [sys.executable, "-c", f"from {__name__} import _print_peak; _print_peak()"],
            input=json.dumps(shared | {"model": model, "runtime": runtime, "files": files}),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            return {}, f"'{model}' did not run in a fresh process: {last}"
        peaks[variant] = int(json.loads(done.stdout.strip().splitlines()[-1])["peak"])
        progress.advance()
    return peaks, None


def _print_peak() -> None:
    """What a fresh process runs: open a pipeline, make a clip, print the peak."""
    task = json.loads(sys.stdin.read())
    for name in task["plugins"]:
        load_plugin(name)
    device, call = task["device"], unpacked(task["call"]) | {"num_inference_steps": 2}  # memory does not grow with the steps
    open_pipeline("tiny-dit")  # what is imported and allocated for any pipeline at all
    before = _reset_peak(device)
    pipe = open_pipeline(task["model"], getattr(torch, task["dtype"]), device, task["files"])
    _put(pipe, task["runtime"])
    sample(pipe, [task["text"]], seed=SEED, **call)
    sys.stdout.write(json.dumps({"peak": _peak(device) - before}) + "\n")


def _reset_peak(device: str) -> int:
    """Forget earlier peaks; the memory in use now."""
    import gc

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    try:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
    except OSError:
        return _peak(device)  # the peak so far: an underestimate of what follows, if anything
    return _status("VmRSS")


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        return _status("VmHWM")
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
