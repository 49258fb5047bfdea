"""What was done, with the figures that prove it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from reelquant._errors import printable
from reelquant._markup import table
from reelquant._numbers import figure, size
from reelquant._sums import write_summed
from reelquant.engine.quality import LayerRecord
from reelquant.engine.search import Trial
from reelquant.nn import AttentionFacts
from reelquant.policies import StepError


@dataclass(repr=False)
class Report:
    """The proof of one quantization. Sizes are bytes of the component; ``skipped`` maps a reason to the layers it holds for.

    With several components :func:`total` makes one report of theirs: sizes are sums, layers are called ``component.layer``, and
    ``parts`` holds the report of each.

    Attributes:
        recipe, digest: name and content hash of the recipe.
        denoiser, component: class and name of the quantized component.
        layers: one record per quantized layer.
        skipped: reason -> names of layers that stay float.
        bytes_float, bytes_quantized: storage of the quantized layers, in float32 and now (codes, scales, biases, shifts).
        bytes_tables: tables of temporal outputs, on top of ``bytes_quantized``.
        bytes_model_float, bytes_model: the whole denoiser.
        bytes_source, bytes_folder: weights of the whole pipeline, in the folder it was read from and in the one it was saved to; None
            before it is saved, and for a pipeline that was read from no folder.
        kernel: kernel name -> number of layers.
        simulated: True if any layer computes in float arithmetic although it is stored in few bits.
        attention: what computes attention with few-bit operands, calls of the final check included; None if the recipe asks for none.
        latent_psnr, latent_psnr_worst: of the held-out clips' final latents against float, dB; None for data-free recipes.
        prompts, held_out: texts of calibration, and of the final check.
        conditions: what their clips were made from beside texts: ``every`` (the same for all, or in turn), ``calibration`` and
            ``held_out``, by the names of the pipeline call; pictures and tensors as size and SHA-256. Empty where it was texts alone.
        figures: what was measured on components that do not denoise: ``prompt_cosine``, ``prompt_cosine_min``, ``picture_cosine``,
            ``picture_cosine_min`` (unitless), ``round_trip_psnr`` (dB).
        protected: slots (indices into ``timesteps``) whose activations are more precise.
        step_bits: bits of ``inputs`` and of ``weights`` at every slot, as far as a recipe gives them; ``apart`` lists groups of ``layers``
            with others, 0 where a step is as stored.
        reuse: by mechanism, how often a part was computed in the final check, and how often an earlier result stood for it.
        steps: what each step's rounding costs, if that decided it.
        parts: report by component, if there are several.
        saturation: what the final check clipped, see :meth:`reelquant.nn.Saturation.facts`; empty if nothing was sampled.
        trials: what the search tried.
        seconds: time per phase.
        adapters: file name -> scale of what was merged into the float weights before.
        source: where the float pipeline was: bundled name, folder or hub id; empty if that is not known.
    """

    recipe: str
    digest: str
    denoiser: str
    component: str
    layers: list[LayerRecord] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    bytes_float: int = 0
    bytes_quantized: int = 0
    bytes_tables: int = 0
    bytes_model_float: int = 0
    bytes_model: int = 0
    bytes_source: int | None = None
    bytes_folder: int | None = None
    kernel: dict[str, int] = field(default_factory=dict)
    simulated: bool = True
    attention: AttentionFacts | None = None
    latent_psnr: float | None = None
    latent_psnr_worst: float | None = None
    trials: list[Trial] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    protected: list[int] = field(default_factory=list)
    step_bits: dict[str, Any] = field(default_factory=dict)
    reuse: dict[str, dict[str, int]] = field(default_factory=dict)
    steps: list[StepError] = field(default_factory=list)
    saturation: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Report] = field(default_factory=dict)
    source: str = ""

    @property
    def by_component(self) -> dict[str, Report]:
        """The report of every component, also if there is only one."""
        return self.parts or {self.component: self}

    @property
    def ratio(self) -> float:
        """How many times smaller the quantized layers are than in float32, scales and all."""
        return self.bytes_float / max(self.bytes_quantized, 1)

    @property
    def counted(self) -> str:
        """How many of the layers are quantized, in words."""
        return f"{len(self.layers)} of {len(self.layers) + sum(len(names) for names in self.skipped.values())} layers quantized"

    def __repr__(self) -> str:
        sizes = f"{size(self.bytes_float)} -> {size(self.bytes_quantized)}, {self.ratio:.2f}x smaller"
        return printable(f"Report({self.recipe} on {self.component}: {self.counted}, {sizes})")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        psnr = None if self.latent_psnr is None else f"{figure(self.latent_psnr, 'dB')} PSNR of the final latents to float"
        rows = {
            "layers": self.counted,
            "their bytes": f"{size(self.bytes_float)} → {size(self.bytes_quantized)} ({self.ratio:.2f}x smaller than float32)",
            "with float layers": f"{size(self.bytes_model_float)} → {size(self.bytes_model)}",
            "held-out clips": psnr,
            **{name.replace("_", " "): figure(value) for name, value in self.figures.items()},
            "kernels": ", ".join(f"{name} ({count})" for name, count in self.kernel.items()),
            "source": self.source,
            "time": ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items()),
        }
        title = f"{self.recipe} on {self.denoiser} ({self.component})"
        return table(title, [(name, words) for name, words in rows.items() if words], notes=self.warnings)

    def mean(self, name: str, role: str | None = None) -> float | None:
        """Mean of a figure over the layers (of one role) that have it."""
        values = [getattr(x, name) for x in self.layers if getattr(x, name) is not None and role in (None, x.role)]
        return sum(values) / len(values) if values else None

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        data = asdict(replace(self, parts={})) | {"ratio": self.ratio}
        return data | {"parts": {name: part.to_json() for name, part in self.parts.items()}}

    def save(self, path: str | Path) -> None:
        """Write ``report.json``, with the sum of its content."""
        write_summed(path, self.to_json())


_SUMS = ("bytes_float", "bytes_quantized", "bytes_tables", "bytes_model_float", "bytes_model")


def total(reports: Mapping[str, Report]) -> Report:
    """One report of those of all components; the only one as it is."""
    parts = list(reports.values())
    if len(parts) == 1:
        return parts[0]
    words = {
        name: ", ".join(dict.fromkeys(getattr(part, name) for part in parts)) for name in ("recipe", "digest", "denoiser", "component")
    }
    found = Report(**words, parts=dict(reports), versions=parts[0].versions, seed=parts[0].seed)
    for component, part in reports.items():
        found.layers += [replace(record, name=f"{component}.{record.name}") for record in part.layers]
        found.warnings += [f"{component}: {text}" for text in part.warnings]
        found.figures |= {f"{component}.{name}": value for name, value in part.figures.items()}
        found.prompts = found.prompts or part.prompts
        found.conditions = found.conditions or part.conditions
        for reason, names in part.skipped.items():
            found.skipped.setdefault(reason, []).extend(f"{component}.{name}" for name in names)
        if part.latent_psnr is not None:  # the last one: all denoisers quantized
            found.latent_psnr, found.latent_psnr_worst = part.latent_psnr, part.latent_psnr_worst
        found.held_out = found.held_out or part.held_out
    for name in _SUMS:
        setattr(found, name, sum(getattr(part, name) for part in parts))
    found.kernel = dict(sum((Counter(part.kernel) for part in parts), Counter()))
    found.seconds = dict(sum((Counter(part.seconds) for part in parts), Counter()))
    found.simulated = any(part.simulated for part in parts)
    found.attention = AttentionFacts.of(part.attention for part in parts)
    return found
