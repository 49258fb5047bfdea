"""What ``reelquant quantize`` is asked to do, and the three ways to do it: plan, in memory, from disk to disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reelquant.cli.options import check_device, opened, torch_dtype
from reelquant.cli.ranks import meeting_place
from reelquant.cli.signals import left_in
from reelquant.ranks import this_rank

if TYPE_CHECKING:
    from reelquant.engine.plan import Plan
    from reelquant.engine.report import Report
    from reelquant.evidence.evaluation import Evaluation
    from reelquant.models.condition import Condition
    from reelquant.recipes.recipe import Recipe
    from reelquant.streaming import Job

GATE_CLIPS = 8


@dataclass(frozen=True)
class Request:
    """One quantization, as the command line describes it.

    Attributes:
        model: bundled name, folder or hub id of the float pipeline.
        recipe: one recipe, or one by component.
        components: which to quantize; None for all denoisers.
        prompts: calibration texts and what goes with them; None for the pipeline's own.
        skip: patterns of layers that stay float.
        lora: adapters to merge first, ``FILE:SCALE``.
        dtype: of the float parts.
        variant: of the weight files.
        device: where to compute.
        max_memory: budget, for example ``8GB``; None for what is free.
        call: arguments of the pipeline call, by the names of diffusers.
    """

    model: str
    recipe: Recipe | dict[str, Recipe]
    components: list[str] | None = None
    prompts: list[Condition] | None = None
    skip: list[str] = field(default_factory=list)
    lora: list[str] = field(default_factory=list)
    dtype: str = "float32"
    variant: str | None = None
    device: str = "cpu"
    max_memory: str | None = None
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def data_free(self) -> bool:
        """Whether no clip is made, so that processes have nothing to share."""
        recipes = self.recipe.values() if isinstance(self.recipe, dict) else [self.recipe]
        return all(one.data_free for one in recipes)

    def open(self) -> Any:
        """The float pipeline, in memory."""
        return opened(self.model, self.device, self.dtype, self.variant)

    def job(self, *, streaming: bool = False) -> Job | None:
        """The work planned from file headers alone; None if it can only be done in memory.

        Text encoders, VAEs, variants and checkpoints that diffusers converts cannot be planned that way.

        Args:
            streaming: the user asked for it, so raise the reason instead of returning None.
        """
        from reelquant.models.pipelines import locate

        kind = torch_dtype(self.dtype)
        locate(self.model)  # before the slow imports
        check_device(self.device)
        from reelquant._errors import CheckpointError, UnsupportedError
        from reelquant.api import folder_job

        if self.variant is not None:
            if streaming or self.max_memory is not None:
                raise UnsupportedError(
                    "--variant needs the model in memory; leave out --max-memory and --resume, or give a folder with that variant only"
                )
            return None
        try:
            return folder_job(
                self.model,
                self.recipe,
                self.prompts,
                self.components,
                self.skip,
                overrides=None,
                lora=self.lora,
                dtype=kind,
                device=self.device,
                max_memory=self.max_memory,
                call=self.call,
            )
        except (CheckpointError, UnsupportedError):
            if streaming or self.max_memory is not None:
                raise
            return None  # other faults of the model are found, and reported, when it is opened in memory

    def plans(self) -> dict[str, Plan]:
        """The plan of every component, from the pipeline in memory."""
        from reelquant.api import plans

        return plans(self.open(), self.recipe, components=self.components, skip=self.skip)

    def run(self, output: Path, *, force: bool) -> tuple[Report, Path]:
        """Quantize in memory and save the pipeline; of several processes, the first one saves it."""
        import shutil

        from reelquant import api
        from reelquant.cli import console

        pipe, shared = self.open(), None if self.data_free else meeting_place(output)
        with left_in(shared, "start the same command again"), console.Bars() as bars:
            report = api.quantize(
                pipe,
                self.recipe,
                self.prompts,
                components=self.components,
                skip=self.skip,
                lora=self.lora,
                shared=shared,
                force=force,
                progress=bars,
                **self.call,
            )
            if not this_rank().first:
                return report, output
            bars.phase("write", 1)
            path = api.save(pipe, output, report, force=force)
            if shared is not None:
                shutil.rmtree(shared, ignore_errors=True)
            return report, path

    def evaluate(self, output: Path, gate: str) -> Evaluation:
        """A short evaluation of what was written: 8 clips, figures that need no downloaded network, no noise floor."""
        from reelquant.cli.console import Bars
        from reelquant.evidence.run import Options, evaluate

        with Bars() as bars:
            return evaluate(
                str(output),
                self.model,
                self.prompts,
                clips=GATE_CLIPS,
                floor=["none"],
                dtype=torch_dtype(self.dtype),
                options=Options(("quick",), gate=gate, device=self.device, progress=bars),
                **self.call,
            )


def stream(job: Job, output: Path, *, resume: bool, force: bool) -> tuple[Report, Path]:
    """Quantize from disk to disk."""
    from reelquant.checkpoint import absolute, work_folder
    from reelquant.cli import console
    from reelquant.streaming import quantize_folder

    path = absolute(output)
    with left_in(work_folder(path)), console.Bars() as bars:
        return quantize_folder(job, path, resume=resume, force=force, progress=bars), path
