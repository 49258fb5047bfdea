"""What loading a model needs in every library: a plan for a model without weights, layers quantized as their tensors arrive, empty layers
that stored tensors are put into, and a line of proof."""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._errors import CalibrationError, CheckpointError, SiteError, UnsupportedError
from reelquant.checkpoint import Stored, verify
from reelquant.discover import discover_or_outline, outline, stand_in, takes_timestep
from reelquant.engine.build import Context, build_group
from reelquant.engine.choice import Choice
from reelquant.engine.plan import Plan, make_plan
from reelquant.graphs import set_runtime
from reelquant.integrations.config import OPTIONS, ReelQuantConfig, data_free
from reelquant.integrations.options import SKIPPED, pattern_of, with_options
from reelquant.nn import (
    QuantLayer,
    ask_attention,
    attention_facts,
    broken,
    count_tensors,
    count_weights,
    dequantized,
    get_module,
    is_finite,
    kernels_of,
    quantized_class,
    quantized_layers,
    round_attention,
    scale_logits,
    set_module,
    start_runtime,
    stop_clock,
    stop_runtime,
    widened,
)
from reelquant.nn.host_memory import release_mmap_pages, trim_heap
from reelquant.nn.refusals import refuse_saving
from reelquant.policies import put_resolution
from reelquant.reuse import install_stored, remove_reuse
from reelquant.sites import DenoiserMap, Group, matches

logger = logging.getLogger(__name__)


def plan_for(model: nn.Module, config: ReelQuantConfig) -> Plan:
    """What a wish makes of a model whose parameters are on the meta device.

    Raises:
        ReelQuantError: if the recipe calibrates or needs the whole model at once, an option names what the model has not, or nothing would
            be quantized.
    """
    found = _map(model)
    recipe = with_options(data_free(config.recipe), model, found.layers.values(), *(getattr(config, option) for option in OPTIONS))
    plan = make_plan(recipe, found, model)
    _refuse_whole(plan)
    _tell_skipped(plan, config)
    return plan


def _refuse_whole(plan: Plan) -> None:
    for entry in plan.entries:
        if entry.stage.in_memory is not None:
            name = plan.recipe.name
            raise UnsupportedError(
                f"recipe '{name}' cannot be followed while weights are loaded, layer by layer, because {entry.stage.in_memory}; load the "
                f"float pipeline, call reelquant.quantize(pipe, '{name}') and reelquant.save(pipe, folder), and open that folder instead"
            )


def _tell_skipped(plan: Plan, config: ReelQuantConfig) -> None:
    """Warn of layers that were given a format and stay float."""
    patterns = [pattern_of(word) for words in (config.modules_dtype_dict or {}).values() for word in words]
    rows = [row for row in plan.skipped if row.skipped != SKIPPED and any(matches(pattern, row.layer) for pattern in patterns)]
    if rows:
        some = ", ".join(f"'{row.layer.name}' ({row.skipped})" for row in rows[:2])
        logger.warning("modules_dtype_dict names %d layers that stay float: %s%s", len(rows), some, " ..." if len(rows) > 2 else "")


def _map(model: nn.Module) -> DenoiserMap:
    return discover_or_outline(model, stand_in) if takes_timestep(model) else outline(model)


def start_loaded(model: nn.Module, stored: Stored, *, covered: bool) -> None:
    """What follows when all tensors of a quantized model are in their layers: check them, start what acts on the model, say what it is.

    Args:
        model: with all its tensors.
        stored: what its config says about it.
        covered: the sums of its files were compared, and those of whole layers need not be.

    Raises:
        CheckpointError: if a tensor is not the one that was stored.
    """
    checked = verify(model, stored.checksums, None if covered else stored.sums)  # before a kernel has taken a weight over
    start_runtime(model, stored.attention)
    remove_reuse(model)  # of a model that was quantized while it was loaded; the same comes back
    install_stored(model, stored.reuse)
    scale_logits(model, stored.logits)
    put_resolution(model, stored.resolution)
    count_weights(model)
    _align(model)
    _log_proof(model, checked)
    trim_heap()


class OnTheFly:
    """Quantizes the layers of a plan one by one, each as soon as its last tensor is loaded; its float weight is freed at once."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        names = [row.layer.name for row in plan.quantized]
        self.waiting = {name: {tensor for tensor, _ in get_module(model, name).named_parameters()} for name in names}
        self._biases: dict[str, Tensor] = {}
        self._lock = threading.Lock()  # shards may be read by several threads

    def wants(self, name: str) -> bool:
        """Whether this tensor belongs to a layer that is going to be quantized."""
        layer, _, tensor = name.rpartition(".")
        return tensor in self.waiting.get(layer, ())

    def take(self, name: str, stored: Tensor, cast: Tensor | None = None) -> None:
        """A tensor of the float checkpoint.

        Args:
            name: its path.
            stored: as the file has it; codes are chosen from these values.
            cast: in the dtype that float parts are loaded in, which the bias keeps.

        Raises:
            CalibrationError: if it holds NaN or inf.
        """
        path, _, tensor = name.rpartition(".")
        stored = widened(stored)
        if not is_finite(stored):
            raise CalibrationError(broken(tensor, path))
        layer = get_module(self.model, path)
        layer._parameters[tensor] = nn.Parameter(stored, requires_grad=False)
        if tensor == "bias":
            self._biases[path] = stored if cast is None else cast
        with self._lock:
            self.waiting[path] -= {tensor}
            complete = not self.waiting[path]
        if complete:
            self._quantize(path, layer)
            release_mmap_pages(stored)

    def _quantize(self, path: str, layer: nn.Module) -> None:
        group = Group((path,), self.plan.layers[path].layer.role)
        context = Context(self.plan, self.model, {}, (), lambda name: get_module(self.model, name))
        quantized = build_group(context, group, Choice.first(self.plan.entries)).layers[path]
        if quantized.bias is not None:
            quantized.bias.data = self._biases.pop(path).clone()
        quantized.requires_grad_(False)
        set_module(self.model, path, quantized)

    def finish(self) -> None:
        """Nothing may be left; stages that act on the model as a whole do so.

        Raises:
            CheckpointError: naming the first tensor that the checkpoint lacks.
            RecipeError: if rules of attention name places of a model that could not be run.
        """
        missing = [f"{path}.{tensor}" for path, tensors in self.waiting.items() for tensor in sorted(tensors)]
        if missing:
            raise CheckpointError(
                f"the checkpoint of {type(self.model).__name__} lacks {len(missing)} tensors that were to be quantized: '{missing[0]}'"
                f"{' ...' if len(missing) > 1 else ''}; download it again"
            )
        for entry in self.plan.entries:
            entry.stage.loaded(entry.name, self.model, self.plan.map)


def put_empty_layers(model: nn.Module, stored: Stored) -> None:
    """Exchange float layers for empty quantized ones.

    Raises:
        CheckpointError: if the description names a layer that does not exist or has no quantized form.
    """
    for name, layout in stored.layers.items():
        module = _float_layer(model, name)
        set_module(model, name, quantized_class(module).like(module, layout, device="meta"))


def check_bias(name: str, dtype: torch.dtype) -> None:
    """Refuse a bias whose bytes are no floats: the cast to the load dtype would take its bits as numbers.

    Raises:
        CheckpointError: naming it.
    """
    if not dtype.is_floating_point:
        raise CheckpointError(f"'{name}' is stored as {dtype} and must be a float; download or save it again")


def put_float_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Exchange quantized layers for stock ones with the values their codes stand for, and stop what ran beside them.

    Biases that the architecture has no place for remain (shifts folded into norms make them, and ``correct_bias``): such a model runs, and
    is not saved.

    Raises:
        UnsupportedError: if weights are offloaded.
    """
    for name, layer in quantized_layers(model).items():
        if layer.weight.device.type == "meta":
            raise UnsupportedError(f"the weight of layer '{name}' is offloaded; take it back (pipe.remove_all_hooks()) before dequantizing")
    set_runtime(model, "torch")  # a graph would go on with the codes
    homeless = []
    for name, layer in quantized_layers(model).items():
        own = layer.bias is not None and not layer.bias_made
        new: Any = dequantized(layer, layer.bias.dtype if own else dtype)
        set_module(model, name, new)
        homeless += [name] if layer.bias_made and new.bias is not None else []
    stop_clock(model)
    stop_runtime(model)
    remove_reuse(model)
    scale_logits(model, None)
    put_resolution(model, None)
    round_attention(model, None)
    ask_attention(model, None)
    count_tensors(model)
    if homeless:
        refuse_saving(model, homeless)


def _float_layer(model: nn.Module, name: str) -> Any:
    """The layer that is to be replaced."""
    try:
        module = get_module(model, name)
    except SiteError as error:
        raise CheckpointError(f"quantization_config names a layer that does not exist: {error}") from None
    if quantized_class(module) is None:
        raise CheckpointError(f"quantization_config names '{name}', which is of type {type(module).__name__} and has no quantized form")
    return module


ALIGNED = 64  # bytes; where torch puts tensors of its own


def _align(model: nn.Module) -> None:
    """Move float tensors from odd addresses of a mapped file into memory of their own.

    Matrix products of the libraries that torch calls sum in another order there. So a model that was quantized while it was loaded and the
    same one opened again, whose files are laid out differently, would differ in the last bits.
    """
    for module in model.modules():
        for value in () if isinstance(module, QuantLayer) else module.parameters(recurse=False):
            if value.device.type == "cpu" and value.data_ptr() % ALIGNED:
                mapped, value.data = value.data, value.data.clone()
                release_mmap_pages(mapped)


def _log_proof(model: nn.Module, checked: int) -> None:
    """What was loaded, how large it is, and what computes it."""
    layers = quantized_layers(model)
    tensors = [t for layer in layers.values() for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))]
    size = sum(t.numel() * t.element_size() for t in tensors)
    kernels = kernels_of(model)
    names = ", ".join(f"{name} x{count}" for name, count in sorted(kernels.names.items())) + (
        " (simulated in part)" if kernels.simulated else ""
    )
    if (attention := attention_facts(model)) is not None:
        names += f"; attention ({attention.asked}): {attention.by}"
    logger.info(
        "%s: %d quantized layers, %d bytes, %d checksums verified, kernels: %s", type(model).__name__, len(layers), size, checked, names
    )
