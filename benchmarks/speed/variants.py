"""Every way to run one denoiser step that ``benchmarks.step`` times: float, this library, and the peers, each from the same checkpoint.

A variant is a function from a :class:`~benchmarks.speed.denoisers.Subject` to :class:`Work`: something to call, and facts about it.
Peers are imported inside of their function, so that the table can be read without them.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from benchmarks.speed.denoisers import CLIPS, TIMESTEPS, Sampler, Subject, noise
from benchmarks.speed.machine import FLOAT, NATIVE
from reelquant.graphs import set_runtime
from reelquant.nn import quantized_layers

RECIPES = ("qvd-w8a8", "minmax-w8a8", "qvd-w4a8", "w8a16")
ENDS = (
    "patch_embed*", "x_embedder*", "context_embedder*", "condition_embedder*", "time_embedding*", "time_text_embed*", "add_embedding*",
    "conv_in", "conv_out", "proj_out", "norm_out*", "*time_emb_proj",
)  # fmt: skip
"""Layers that peers without a list of their own leave in float: embedders and heads, as the recipes of this library do."""


@dataclass
class Work:
    """One denoiser step, ready to run: the function gives the output, ``facts`` end up in the row."""

    run: Callable[[], Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        make: prepares the step.
        package: what must be installed, as pip names it.
        bits: weights and activations.
        note: what the reader should know.
        own_threads: it computes on threads of its own, so the CPU time of the process is read.
    """

    make: Callable[[Subject], Work]
    bits: str
    package: str | None = None
    note: str = ""
    own_threads: bool = False


def missing(variant: Variant) -> str | None:
    """The command that installs what a variant needs, or None."""
    try:
        for package in (variant.package or "torch").split():
            importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"pip install --no-deps {variant.package}"
    return None


def stepping(subject: Subject, denoiser: nn.Module, dtype: torch.dtype, compiled: bool = False) -> Callable[[], Tensor]:
    """One call of a denoiser on the subject's inputs."""
    inputs = subject.spec.inputs(denoiser, dtype)
    called = torch.compile(denoiser, dynamic=False) if compiled else denoiser

    def run() -> Tensor:
        with torch.no_grad():
            return called(**inputs)[0]

    return run


# --- float and ours -------------------------------------------------------------------------------------------------------------------


def plain(dtype: torch.dtype, compiled: bool = False) -> Callable[[Subject], Work]:
    """The float denoiser."""
    return lambda subject: Work(stepping(subject, subject.load(dtype), dtype, compiled))


def ours(recipe: str, compiled: bool = False) -> Callable[[Subject], Work]:
    """A recipe of this library; the rest of the denoiser in the float numbers of the machine."""

    def make(subject: Subject) -> Work:
        denoiser = subject.quantized(recipe, NATIVE)
        kernels = Counter(layer.kernel.name for layer in quantized_layers(denoiser).values())
        return Work(stepping(subject, denoiser, NATIVE, compiled), {"kernels": dict(kernels)})

    return make


def ours_in_openvino(recipe: str, dtype: torch.dtype) -> Callable[[Subject], Work]:
    """A recipe of this library as one OpenVINO graph; what is not integer in this dtype, where the processor has it."""

    def make(subject: Subject) -> Work:
        denoiser = subject.quantized(recipe, dtype)
        set_runtime(denoiser, "openvino")
        run = stepping(subject, denoiser, dtype)
        run()  # what computes a layer is known when the graph is there
        kernels = Counter(layer.kernel.name for layer in quantized_layers(denoiser).values())
        return Work(run, {"kernels": dict(kernels)})

    return make


# --- peers in torch -------------------------------------------------------------------------------------------------------------------


def torchao(config: str, dtype: torch.dtype, compiled: bool = False) -> Callable[[Subject], Work]:
    """torchao on linear layers; it has no convolutions."""

    def make(subject: Subject) -> Work:
        from torchao import quantization

        def chosen(module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.Linear) and not any(fnmatch(name, pattern) for pattern in ENDS)

        denoiser = subject.load(dtype)
        quantization.quantize_(denoiser, getattr(quantization, config)(), filter_fn=chosen)
        return Work(stepping(subject, denoiser, dtype, compiled))

    return make


def sdnq(**options: Any) -> Callable[[Subject], Work]:
    """SDNQ with its own list of layers to skip; it compiles its kernels itself."""

    def make(subject: Subject) -> Work:
        from sdnq import sdnq_post_load_quant

        denoiser = sdnq_post_load_quant(subject.load(NATIVE), torch_dtype=NATIVE, **options)
        return Work(stepping(subject, denoiser, NATIVE), {"compiles": os.environ.get("SDNQ_USE_TORCH_COMPILE", "1")})

    return make


def quanto(activations: str | None = None) -> Callable[[Subject], Work]:
    """optimum-quanto; with activations it sees the step once to find ranges."""

    def make(subject: Subject) -> Work:
        from optimum.quanto import Calibration, freeze, quantize

        denoiser = subject.load(NATIVE)
        quantize(denoiser, weights="qint8", activations=activations, exclude=list(ENDS))
        run = stepping(subject, denoiser, NATIVE)
        if activations:
            with Calibration():
                run()
        freeze(denoiser)
        return Work(run)

    return make


def orbitquant(weight_bits: int, activation_bits: int, codebook: int) -> Callable[[Subject], Work]:
    """OrbitQuant with the policy it has for the denoiser's class."""

    def make(subject: Subject) -> Work:
        from orbitquant import OrbitQuantConfig, quantize_pipeline

        sampler = Sampler(subject.spec, subject.load(NATIVE))
        config = OrbitQuantConfig(weight_bits=weight_bits, activation_bits=activation_bits, codebook_version=codebook)
        quantize_pipeline(sampler, config, component="denoiser")
        return Work(stepping(subject, sampler.components["denoiser"], NATIVE))

    return make


# --- peers with a graph of their own --------------------------------------------------------------------------------------------------


class Positional(nn.Module):
    """A denoiser called with a flat row of tensors: what exporters of graphs can read."""

    def __init__(self, denoiser: nn.Module, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.denoiser = denoiser
        leaves, self.tree = tree_flatten(inputs)
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def forward(self, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        leaves = [next(given) if leaf is None else leaf for leaf in self.leaves]
        return self.denoiser(**tree_unflatten(leaves, self.tree))[0]


def flat(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The tensors of nested arguments in the order of :class:`Positional`."""
    return tuple(leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor))


def examples(subject: Subject, denoiser: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """Inputs to find ranges on: the same timesteps and as many clips as our recipes get."""
    for clip in range(CLIPS):
        for timestep in TIMESTEPS:
            yield flat(subject.spec.inputs(denoiser, torch.float32, timestep, noise(*subject.spec.latent, seed=100 + clip)))


def _once(file: Path, make: Callable[[Path], None]) -> Path:
    """A graph on disk, exported by the first process that needs it."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        make(file)
    return file


def _openvino_float(subject: Subject) -> Path:
    def export(file: Path) -> None:
        import openvino

        denoiser = subject.load()
        inputs = subject.spec.inputs(denoiser, torch.float32)
        with torch.no_grad():
            graph = openvino.convert_model(Positional(denoiser, inputs).eval(), example_input=flat(inputs))
        graph.reshape({index: list(tensor.shape) for index, tensor in enumerate(flat(inputs))})
        openvino.save_model(graph, file, compress_to_fp16=False)

    return _once(subject.home / "openvino" / "float.xml", export)


def _openvino_int8(subject: Subject) -> Path:
    def quantize(file: Path) -> None:
        import nncf
        import openvino

        graph = openvino.Core().read_model(_openvino_float(subject))
        data = [[tensor.numpy() for tensor in row] for row in examples(subject, subject.load())]
        quantized = nncf.quantize(graph, nncf.Dataset(data), subset_size=len(data), model_type=nncf.ModelType.TRANSFORMER)
        openvino.save_model(quantized, file, compress_to_fp16=False)

    return _once(subject.home / "openvino" / "int8.xml", quantize)


def openvino(graph: Callable[[Subject], Path], precision: str) -> Callable[[Subject], Work]:
    """OpenVINO on the graph, operators that are not int8 in this precision."""

    def make(subject: Subject) -> Work:
        import openvino

        threads = torch.get_num_threads()
        options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision, "ENABLE_CPU_PINNING": False}
        request = openvino.Core().compile_model(str(graph(subject)), "CPU", options).create_infer_request()
        for index, tensor in enumerate(_example(subject)):
            request.set_input_tensor(index, openvino.Tensor(tensor.numpy().copy()))

        def run() -> Tensor:
            request.infer()
            return torch.from_numpy(request.get_output_tensor(0).data)

        return Work(run)

    return make


def _example(subject: Subject) -> tuple[Tensor, ...]:
    import diffusers

    with torch.device("meta"):
        denoiser = getattr(diffusers, subject.spec.cls)(**subject.spec.config)
    return flat(subject.spec.inputs(denoiser, torch.float32))


def onnxruntime(quantized: bool) -> Callable[[Subject], Work]:
    """ONNX Runtime, float32 or with its dynamic int8 quantization."""

    def export(subject: Subject) -> Path:
        def write(file: Path) -> None:
            denoiser = subject.load()
            inputs = subject.spec.inputs(denoiser, torch.float32)
            with torch.no_grad():
                program = torch.onnx.export(Positional(denoiser, inputs).eval(), flat(inputs), dynamo=True, verbose=False)
            program.save(str(file), external_data=True)

        return _once(subject.home / "onnx" / "float.onnx", write)

    def quantize(subject: Subject) -> Path:
        def write(file: Path) -> None:
            import onnx
            from onnxruntime.quantization import QuantType, quantize_dynamic

            graph = onnx.load(export(subject))
            del graph.graph.value_info[:]  # shapes that its own shape inference disagrees with
            quantize_dynamic(graph, file, weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=True)

        return _once(subject.home / "onnx" / "int8.onnx", write)

    def make(subject: Subject) -> Work:
        from onnxruntime import InferenceSession, SessionOptions

        options = SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        session = InferenceSession((quantize if quantized else export)(subject), options, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        feed = {name: tensor.numpy() for name, tensor in zip(names, _example(subject), strict=True)}
        return Work(lambda: torch.from_numpy(session.run(None, feed)[0]))

    return make


# --- the table ------------------------------------------------------------------------------------------------------------------------

BASE, REFERENCE = FLOAT, "fp32"
TORCHAO, QUANTO, OPENVINO, ONNX = "torchao", "optimum-quanto", "openvino", "onnxruntime onnx onnxscript onnx_ir"
DYNAMIC = "Int8DynamicActivationInt8WeightConfig"
BITS = {"qvd-w8a8": "8/8 static", "minmax-w8a8": "8/8 static", "qvd-w4a8": "4/8 static", "w8a16": "8/16"}

VARIANTS: dict[str, Variant] = {
    "bf16": Variant(plain(torch.bfloat16), "16/16", note="UNets channels-last"),
    REFERENCE: Variant(plain(torch.float32), "32/32", note="what errors are held against"),
    f"{BASE} compiled": Variant(plain(NATIVE, compiled=True), f"{8 * NATIVE.itemsize}/{8 * NATIVE.itemsize}"),
    **{f"ours {name}": Variant(ours(name), BITS[name], note="this library, eager") for name in RECIPES},
    **{f"ours {name} compiled": Variant(ours(name, compiled=True), BITS[name], note="this library") for name in RECIPES[:2]},
    **{
        f"ours {name} openvino": Variant(
            ours_in_openvino(name, NATIVE), BITS[name], OPENVINO, "this library, one OpenVINO graph", own_threads=True
        )
        for name in RECIPES[:3]
    },
    "torchao w8a8": Variant(torchao(DYNAMIC, NATIVE), "8/8 dynamic", TORCHAO, "linear layers only"),
    "torchao w8a8 compiled": Variant(torchao(DYNAMIC, torch.float32, compiled=True), "8/8 dynamic", TORCHAO, "on float32, bf16 fails"),
    "torchao w8 compiled": Variant(torchao("Int8WeightOnlyConfig", NATIVE, compiled=True), "8/16", TORCHAO, "linear layers only"),
    "sdnq int8 matmul": Variant(
        sdnq(use_quantized_matmul=True, quant_conv=True, use_quantized_matmul_conv=True), "8/8 dynamic", "sdnq",
        "with convolutions; compiles its kernels unless SDNQ_USE_TORCH_COMPILE=0",
    ),
    "quanto w8": Variant(quanto(), "8/16", QUANTO, "no Conv3d"),
    "quanto w8a8": Variant(quanto("qint8"), "8/8 static", QUANTO, "no Conv3d"),
    "orbitquant w4a8": Variant(orbitquant(4, 8, 1), "4/8 dynamic", "orbitquant", "linear layers only; codebooks"),
    "openvino bf16": Variant(openvino(_openvino_float, "bf16"), "16/16", OPENVINO, own_threads=True),
    "openvino int8 + fp32": Variant(openvino(_openvino_int8, "f32"), "8/8 static", f"{OPENVINO} nncf", "NNCF PTQ", own_threads=True),
    "openvino int8 + bf16": Variant(
        openvino(_openvino_int8, "bf16"), "8/8 static", f"{OPENVINO} nncf", "NNCF PTQ, other operators in bf16", own_threads=True
    ),
    "onnxruntime fp32": Variant(onnxruntime(False), "32/32", ONNX, own_threads=True),
    "onnxruntime int8": Variant(onnxruntime(True), "8/8 dynamic", ONNX, own_threads=True),
}  # fmt: skip
