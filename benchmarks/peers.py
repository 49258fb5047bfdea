"""The peers and reelquant's own recipes on the same clips: distance to float32, judge accuracy, bytes.

Run it from the repository root, in an environment that holds the peers::

    pip install -e . && pip install --no-deps sdnq torchao optimum-quanto ninja orbitquant
    python -m benchmarks.peers --pipeline tiny-dit --clips 64 --output runs/peers
    python -m benchmarks.peers --pipeline tiny-unet --clips 64 --output runs/peers

Rows that are already in the output are not measured again. A peer that is not installed gets a row that says so.
Every peer starts from the float32 denoiser, so none is charged for bf16 rounding, and runs eagerly; times say nothing about its kernels.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import reelquant
from benchmarks.common import (
    Clips,
    Records,
    denoiser,
    layer_sizes,
    markdown,
    measure,
    parser,
    quantized_layers,
    report_facts,
    weight_bytes,
    write_csv,
)
from reelquant.evidence import bootstrap
from reelquant.models.pipelines import calibration_prompts
from reelquant.models.sampling import sample
from reelquant.recipes.recipe import load_recipe

os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # the same numbers without minutes of compilation

SKIPS = {
    # embedders and the output head: what SDNQ, ModelOpt and vLLM-Omni leave in float on Wan
    "WanTransformer3DModel": ("patch_embedding", "condition_embedder*", "proj_out"),
    "LTXVideoTransformer3DModel": ("proj_in", "time_embed*", "caption_projection*", "proj_out"),  # the same layers
    # first, last, time and shortcut layers: what ModelOpt leaves in float on UNets
    "UNetMotionModel": ("conv_in", "conv_out", "time_embedding*", "*time_emb_proj", "*conv_shortcut"),
}
"""Layers that peers without a list of their own (torchao, optimum-quanto) keep in float."""

KEYWORD_LAYERS = {"UNetMotionModel": ("*motion_modules*.proj_in", "*motion_modules*.proj_out")}
"""Layers that diffusers calls as ``layer(input=...)``."""


@dataclass
class Subject:
    """A fresh float pipeline that a configuration may change."""

    pipe: Any
    clips: Clips
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def component(self) -> str:
        return denoiser(self.pipe)[0]

    @property
    def denoiser(self) -> nn.Module:
        return denoiser(self.pipe)[1]

    def patterns(self, table: dict[str, tuple[str, ...]]) -> list[str]:
        """The entry of the denoiser's class."""
        return list(table.get(type(self.denoiser).__name__, ()))

    @property
    def skips(self) -> list[str]:
        return self.patterns(SKIPS)


Apply = Callable[[Subject], Any]
"""Quantizes the subject's denoiser; may return another pipeline."""


@dataclass(frozen=True)
class Configuration:
    """One row.

    Attributes:
        name: of the row.
        bits: weights and activations, for the table.
        apply: does it.
        package: what must be installed.
        skips: what stays float, in words.
        note: what the reader should know.
        rival: the recipe that this row is compared with clip by clip.
        batch: clips per call, if not the usual number.
        only: the one pipeline it makes sense on.
        quantizes: False for the float rows.
        recipe: name of the recipe, if it is one of this library.
    """

    name: str
    bits: str
    apply: Apply
    package: str | None = None
    skips: str = "-"
    note: str = ""
    rival: str | None = None
    batch: int | None = None
    only: str | None = None
    quantizes: bool = True
    recipe: str | None = None

    def digest(self, clips: Clips) -> str:
        """Changes with the clips and, for recipes of this library, with the recipe."""
        return f"{clips.digest}-{load_recipe(self.recipe).digest()}" if self.recipe else clips.digest


# --- float ----------------------------------------------------------------------------------------------------------------------------


def unchanged(subject: Subject) -> None:
    """Float32 as it is."""


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 else value


def _float_output(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(_cast(value, torch.float32) for value in output)
    output.sample = _cast(output.sample, torch.float32)
    return output


def _bf16_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(_cast(value, torch.bfloat16) for value in args), {key: _cast(value, torch.bfloat16) for key, value in kwargs.items()}


def bf16(subject: Subject) -> None:
    """The denoiser alone in bf16, as diffusers loads it; scheduler, text encoder and decoder stay float32."""
    folder = subject.pipe.config._name_or_path
    half = type(subject.denoiser).from_pretrained(folder, subfolder=subject.component, torch_dtype=torch.bfloat16)
    half.register_forward_pre_hook(_bf16_inputs, with_kwargs=True)
    half.register_forward_hook(_float_output)
    setattr(subject.pipe, subject.component, half)


def bf16_pipeline(subject: Subject) -> Any:
    """Everything in bf16: the usual ``torch_dtype=torch.bfloat16``."""
    return subject.clips.open(torch.bfloat16)


# --- peers ----------------------------------------------------------------------------------------------------------------------------


def sdnq(**options: Any) -> Apply:
    """SDNQ with its own list of layers to skip."""

    def apply(subject: Subject) -> None:
        from sdnq import sdnq_post_load_quant

        sdnq_post_load_quant(subject.denoiser, **options)

    return apply


def sdnq_everything(**options: Any) -> Apply:
    """SDNQ without its lower limit on layer sizes, and with convolutions, except the first and the last."""
    ends = ["conv_in", "conv_out"]
    return sdnq(**options, quant_conv=True, minimum_allowed_numel=0, minimum_allowed_channel_size=0, modules_to_not_convert=ends)


def torchao(config: Callable[[], Any], half: bool = False) -> Apply:
    """torchao on all linear layers but the skipped ones, from the float32 or the bf16 denoiser."""

    def apply(subject: Subject) -> None:
        from torchao.quantization import quantize_

        if half:
            bf16(subject)
        skips = subject.skips

        def chosen(module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.Linear) and not any(fnmatch(name, pattern) for pattern in skips)

        quantize_(subject.denoiser, config(), filter_fn=chosen)

    return apply


def torchao_int8_dynamic() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def torchao_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def torchao_int4() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def torchao_int4_cpu() -> Any:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=32)


def torchao_w4a8() -> Any:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup

    return Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))


def quanto(weights: str, activations: str | None = None) -> Apply:
    """optimum-quanto; with activations it is calibrated on the prompts that ``qvd-w8a8`` calibrates on."""

    def apply(subject: Subject) -> None:
        from optimum.quanto import Calibration, freeze, quantize

        keyword = subject.patterns(KEYWORD_LAYERS) if activations else []
        if keyword:
            quantize(subject.denoiser, weights=weights, include=keyword)
        quantize(subject.denoiser, weights=weights, activations=activations, exclude=[*subject.skips, *keyword])
        if activations:
            calibration = load_recipe("qvd-w8a8").calibrate
            assert calibration is not None
            texts = calibration_prompts(subject.pipe, calibration.prompts)
            with torch.no_grad(), Calibration():
                sample(subject.pipe, texts, seed=calibration.seed, batch=subject.clips.batch, output="latent", **subject.clips.call)
        freeze(subject.denoiser)

    return apply


def orbitquant(weight_bits: int, activation_bits: int, codebook: int) -> Apply:
    """OrbitQuant with the policy it has for the denoiser's class, and a version of its codebooks."""

    def apply(subject: Subject) -> None:
        from orbitquant import OrbitQuantConfig, quantize_pipeline

        config = OrbitQuantConfig(weight_bits=weight_bits, activation_bits=activation_bits, codebook_version=codebook)
        quantize_pipeline(subject.pipe, config, component=subject.component)

    return apply


def recipe(name: str, linear_only: bool = False) -> Apply:
    """A recipe of reelquant with its defaults; or without the layers that torchao keeps in float."""

    def apply(subject: Subject) -> None:
        skip = [*(f"maybe:{pattern}" for pattern in subject.skips), "class:Conv1d", "class:Conv2d", "class:Conv3d"] if linear_only else []
        subject.facts |= report_facts(reelquant.quantize(subject.pipe, name, skip=skip, **subject.clips.call))

    return apply


# --- the table ------------------------------------------------------------------------------------------------------------------------

OWN = "SDNQ's own list"
LIST = "benchmarks/peers.py SKIPS"
LINEAR = "linear layers only: it has no convolutions"
W8A8, W4A8, W8A16, W4A16 = "qvd-w8a8", "qvd-w4a8", "w8a16", "w4a16"
SDNQ, TORCHAO, QUANTO, ORBITQUANT = "sdnq", "torchao", "optimum-quanto", "orbitquant"
UNET = "tiny-unet"
POLICY = "OrbitQuant's own policy"
ORBIT_NOTE = f"{LINEAR}; rotated Lloyd-Max codebooks, one norm per token"
ORBIT_8 = "; codebooks of version 1: those of version 2 were still being computed after ten minutes at 8 bits"
SMALL = "linear layers of 16384 weights and more: its defaults skip smaller ones and convolutions"
FULL = "convolutions and small layers too"
UNPACKED = f"{LINEAR}; groups of 32, stored one code per byte"
CPU = f"{LINEAR}; prototype for CPUs, groups of 32, in bf16: its float32 kernel takes 70 times as long"
STATIC = "one range per tensor; quantizes norms' outputs too; layers called by keyword get float inputs: its hooks fail on them"

CONFIGURATIONS = [
    Configuration("float", "32/32", unchanged, quantizes=False, note="the clips that all others are held against"),
    Configuration("float, one clip a call", "32/32", unchanged, quantizes=False, batch=1, note="the noise of float32 arithmetic"),
    Configuration("bf16", "16/16", bf16, quantizes=False, note="denoiser only"),
    Configuration("bf16 pipeline", "16/16", bf16_pipeline, quantizes=False, note="text encoder, scheduler state and decoder too"),
    Configuration("sdnq-int8-matmul", "8/8 dynamic", sdnq(use_quantized_matmul=True), SDNQ, OWN, SMALL, W8A8),
    Configuration("sdnq-int8", "8/16", sdnq(), SDNQ, OWN, SMALL, W8A16),
    Configuration("sdnq-uint4-matmul", "4/8 dynamic", sdnq(weights_dtype="uint4", use_quantized_matmul=True), SDNQ, OWN, SMALL, W4A8),
    Configuration("sdnq-uint4", "4/16", sdnq(weights_dtype="uint4"), SDNQ, OWN, SMALL, W4A16),
    Configuration("sdnq-int4", "4/16", sdnq(weights_dtype="int4"), SDNQ, OWN, SMALL, W4A16),
    Configuration(
        "sdnq-int8-matmul, all layers", "8/8 dynamic", sdnq_everything(use_quantized_matmul=True, use_quantized_matmul_conv=True),
        SDNQ, OWN + ", conv_in, conv_out", FULL, W8A8, only=UNET,
    ),
    Configuration("sdnq-int8, all layers", "8/16", sdnq_everything(), SDNQ, OWN + ", conv_in, conv_out", FULL, W8A16, only=UNET),
    Configuration(
        "sdnq-uint4-matmul, all layers", "4/8 dynamic",
        sdnq_everything(weights_dtype="uint4", use_quantized_matmul=True, use_quantized_matmul_conv=True),
        SDNQ, OWN + ", conv_in, conv_out", FULL, W4A8, only=UNET,
    ),
    Configuration(
        "sdnq-uint4, all layers", "4/16", sdnq_everything(weights_dtype="uint4"), SDNQ, OWN + ", conv_in, conv_out", FULL, W4A16, only=UNET
    ),
    Configuration("torchao-int8-dynamic", "8/8 dynamic", torchao(torchao_int8_dynamic), TORCHAO, LIST, LINEAR, W8A8),
    Configuration("torchao-int8", "8/16", torchao(torchao_int8), TORCHAO, LIST, LINEAR, W8A16),
    Configuration("torchao-w4a8", "4/8 dynamic", torchao(torchao_w4a8), TORCHAO, LIST, UNPACKED, W4A8),
    Configuration("torchao-int4", "4/16", torchao(torchao_int4), TORCHAO, LIST, UNPACKED, W4A16),
    Configuration("torchao-int4-cpu", "4/16", torchao(torchao_int4_cpu, half=True), TORCHAO, LIST, CPU, W4A16),
    Configuration("quanto-int8-static", "8/8 static", quanto("qint8", "qint8"), QUANTO, LIST, STATIC, W8A8),
    Configuration("quanto-int8", "8/16", quanto("qint8"), QUANTO, LIST, "Conv2d too, no Conv3d", W8A16),
    Configuration("quanto-int4", "4/16", quanto("qint4"), QUANTO, LIST, "Conv2d too, no Conv3d; groups of 128 where they fit", W4A16),
    Configuration("orbitquant-w8a8", "8/8 dynamic", orbitquant(8, 8, 1), ORBITQUANT, POLICY, ORBIT_NOTE + ORBIT_8, W8A8),
    Configuration("orbitquant-w4a8", "4/8 dynamic", orbitquant(4, 8, 1), ORBITQUANT, POLICY, ORBIT_NOTE + ORBIT_8, W4A8),
    Configuration("orbitquant-w4a6", "4/6 dynamic", orbitquant(4, 6, 2), ORBITQUANT, POLICY, ORBIT_NOTE, W4A8),
    Configuration(
        "qvd-w8a8, linear layers only", "8/8 static", recipe("qvd-w8a8", linear_only=True), skips=LIST,
        note="this library, torchao's layers",
        recipe="qvd-w8a8", only=UNET,
    ),
    *(
        Configuration(name, bits, recipe(name), skips="by role", note="this library", recipe=name)
        for name, bits in {
            "minmax-w8a8": "8/8 static", "minmax-w6a6": "6/6 static", "minmax-w4a8": "4/8 static",
            "qvd-w8a8": "8/8 static", "qvd-w6a6": "6/6 static", "qvd-w4a8": "4/8 static",
            "w8a16": "8/16", "w4a16": "4/16",
        }.items()
    ),
]  # fmt: skip


# --- running --------------------------------------------------------------------------------------------------------------------------


def version(package: str | None) -> str | None:
    """Of an installed package; None if there is none, ``reelquant``'s for no package."""
    try:
        return importlib.metadata.version(package) if package else reelquant.__version__
    except importlib.metadata.PackageNotFoundError:
        return None


def run(configuration: Configuration, clips: Clips, reference: Tensor) -> dict[str, Any]:
    """Quantize, sample and measure one configuration."""
    subject = Subject(clips.open(), clips)
    sizes = layer_sizes(subject.denoiser)
    torch.manual_seed(0)
    start = time.perf_counter()
    with torch.no_grad():
        pipe = configuration.apply(subject) or subject.pipe
    prepared = time.perf_counter()
    model = denoiser(pipe)[1]
    quantized = quantized_layers(model, sizes)
    if configuration.quantizes and not quantized:
        raise RuntimeError("no layer was quantized")
    frames = reference if configuration.name == "float" else clips.frames(pipe, configuration.batch)
    return {
        **measure(frames, reference, clips.prompts),
        "bytes": weight_bytes(model),
        "layers": len(sizes),
        "layers_quantized": len(quantized),
        "share": sum(sizes[name] for name in quantized) / sum(sizes.values()),
        "seconds_quantize": prepared - start,
        "seconds_sample": time.perf_counter() - prepared,
        **subject.facts,
    }


def row(configuration: Configuration, clips: Clips, reference: Tensor) -> dict[str, Any]:
    """The record of one configuration: measured, failed (with the reason), or not installed (with the command)."""
    found = version(configuration.package)
    record: dict[str, Any] = {
        "name": configuration.name, "pipeline": clips.name, "clips": clips.count,
        "digest": configuration.digest(clips), "bits": configuration.bits,
        "package": configuration.package or "reelquant", "version": found, "torch": torch.__version__,
        "skips": configuration.skips, "note": configuration.note, "rival": configuration.rival,
    }  # fmt: skip
    if found is None:
        return record | {"status": "not installed", "reason": f"pip install --no-deps {configuration.package}"}
    try:
        return record | {"status": "measured"} | run(configuration, clips, reference)
    except Exception as error:
        traceback.print_exc()
        reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")
        return record | {"status": "failed", "reason": reason[:300]}


# --- tables ---------------------------------------------------------------------------------------------------------------------------

KINDS = ("color", "shape", "digit", "motion")
DECIBELS = ("PSNR to float, dB (95 %)", "rival minus this, dB (95 %)", "rival")
HEADINGS = ("configuration", "bits w/a", *DECIBELS, *KINDS, "MB", "weights quantized", "note")


def _difference(record: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    """The rival recipe's PSNR minus this row's, clip by clip."""
    rival = rows.get(record["rival"] or "", {})
    if "psnr" not in rival:
        return "-"
    return str(bootstrap([ours - theirs for ours, theirs in zip(rival["psnr"], record["psnr"], strict=True)]))


def _line(record: dict[str, Any], rows: dict[str, dict[str, Any]]) -> list[str]:
    if record["status"] != "measured":
        return [record["name"], record["bits"], record["status"], *["-"] * (len(HEADINGS) - 4), record["reason"].replace("|", "/")]
    judge = [f"{100 * record['judge'][kind]:.0f} %" if kind in record["judge"] else "-" for kind in KINDS]
    own = "-" if record["name"] == "float" else str(bootstrap(record["psnr"]))
    size, share = f"{record['bytes'] / 1e6:.2f}", f"{100 * record['share']:.0f} %"
    return [record["name"], record["bits"], own, _difference(record, rows), record["rival"] or "-", *judge, size, share, record["note"]]


NESTED = ("psnr", "judge", "search", "warnings", "phases")


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """A record without lists and nested tables, for CSV."""
    return {key: value for key, value in record.items() if key not in NESTED} | {
        f"judge_{kind}": value for kind, value in record.get("judge", {}).items()
    }


def write_tables(records: Records, clips: Clips, folder: Path) -> str:
    """CSV and Markdown of the rows that belong to these clips, in the order of the table of configurations."""
    known = {(record["name"], record["digest"]): record for record in records.load()}
    keys = [(configuration.name, configuration.digest(clips)) for configuration in CONFIGURATIONS]
    ordered = [known[key] for key in keys if key in known]
    rows = {record["name"]: record for record in ordered}
    write_csv(folder / f"{clips.name}.csv", map(flat, ordered))
    versions = {record["package"]: record["version"] for record in ordered if record["version"]} | {"torch": torch.__version__}
    title = f"## {clips.name}, {clips.count} clips\n\n{', '.join(f'{name} {value}' for name, value in versions.items())}\n\n"
    text = title + markdown(HEADINGS, [_line(record, rows) for record in ordered])
    (folder / f"{clips.name}.md").write_text(text)
    return text


# --- command line ---------------------------------------------------------------------------------------------------------------------


def selected(pipeline: str, only: str | None) -> list[Configuration]:
    """Configurations for a pipeline whose names match one of the comma-separated patterns.

    Raises:
        SystemExit: if a pattern matches none.
    """
    fitting = [configuration for configuration in CONFIGURATIONS if configuration.only in (None, pipeline)]
    patterns = [part.strip() for part in only.split(";")] if only else ["*"]
    for pattern in patterns:
        if not any(fnmatch(configuration.name, pattern) for configuration in fitting):
            raise SystemExit(f"no configuration matches '{pattern}'; there are: {'; '.join(c.name for c in fitting)}")
    return [configuration for configuration in fitting if any(fnmatch(configuration.name, pattern) for pattern in patterns)]


def main() -> None:
    """Parse the command line and measure what is missing."""
    options = parser(__doc__)
    options.add_argument("--only", help="names or patterns, separated by semicolons")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    clips = Clips(args.pipeline, args.clips, dict(args.set), args.batch)
    records = Records(args.output / "rows.jsonl")
    chosen = [] if args.table else [c for c in selected(clips.name, args.only) if not records.done(c.name, c.digest(clips))]
    reference = clips.float_frames(args.output) if chosen else None
    for position, configuration in enumerate(chosen, 1):
        if Clips(args.pipeline, args.clips, clips.call, args.batch).digest != clips.digest:
            raise SystemExit(f"the weights of '{args.pipeline}' changed while they were measured; run again")
        record = row(configuration, clips, reference)
        records.add(record)
        outcome = f"{record['psnr_mean']:.2f} dB, {record['seconds_sample']:.0f} s" if "psnr_mean" in record else record["reason"]
        print(f"[{position}/{len(chosen)}] {configuration.name}: {record['status']}, {outcome}", flush=True)
        gc.collect()
    print(write_tables(records, clips, args.output))


if __name__ == "__main__":
    main()
